"""Names of models and datasets: local folders and hub ids, and whether the hub answers. Nothing is loaded."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core.errors import UserError

_TIMEOUT_S = 10.0
_MODEL_FILES = ("config.json", "tokenizer_config.json")  # at least one of them: a folder may hold a tokenizer alone


def is_hub_id(name_or_path: str) -> bool:
    """Whether a name is a hub id: `name` or `owner/name`, unless a file or folder of that name lies here."""
    has_the_form = name_or_path.count("/") <= 1 and not name_or_path.startswith((".", "/", "~"))
    return has_the_form and not Path(name_or_path).exists()


def can_be_on_hub(name: str) -> bool:
    """Whether the hub allows a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_model_path(name_or_path: str) -> None:
    """Refuse a local folder without a model.

    Raises:
        UserError: the name is that of a local folder, and it holds no model; or nothing on the hub can be called so.
    """
    folder = Path(name_or_path).expanduser()
    if is_hub_id(name_or_path):
        is_possible = can_be_on_hub(name_or_path)
    else:
        is_possible = any((folder / file).is_file() for file in _MODEL_FILES)
    if not is_possible:
        raise UserError(
            f"model path {name_or_path!r} holds no model",
            expected="a folder with config.json and safetensors weights, or a hub id such as Qwen/Qwen2.5-7B-Instruct",
            remedy="check the path, or set model_name_or_path / student_model to a hub id",
        )


def hub_problem(timeout_s: float = _TIMEOUT_S) -> str | None:
    """Why nothing can be fetched from the hub, after one request; None where it answers."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=timeout_s)
    except httpx.HTTPError as error:
        return f"the hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__})"
    return None


def check_push(repository: str) -> None:
    """
    Raises:
        UserError: nothing can be uploaded under that name: no such name can be, the hub is off, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    if not can_be_on_hub(repository):
        raise UserError(
            f"{repository!r} cannot be the name of a repository",
            expected="OWNER/NAME of letters, digits, `-`, `_` and `.`",
            remedy="give another name",
        )
    if constants.HF_HUB_OFFLINE or get_token() is None:
        raise UserError(
            f"{repository}: " + ("HF_HUB_OFFLINE is on" if constants.HF_HUB_OFFLINE else "there is no access token"),
            expected="a connection to the hub and a token that may write",
            remedy="`hf auth login` or HF_TOKEN in the environment; or upload the folder afterwards",
        )


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool,
    kind: Literal["model", "dataset"] = "model",
    files: Sequence[str] | None = None,
) -> str:
    """Upload a folder, or these files of it, to a repository of the hub, made where it is not there; its address.

    The token is the one of this machine (`check_push`); it is not shown.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        url = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=kind,
            allow_patterns=list(files) if files is not None else None,
            commit_message=f"Upload {folder.name}",
        )
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise UserError(
            f"{repository} was not uploaded: {str(error).strip().splitlines()[0]}",
            expected="a repository that this token may write to",
            remedy=f"the folder {folder} is whole: hf upload {repository} {folder}",
        ) from error
    return str(url)


def model_is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in _MODEL_FILES)


def dataset_is_cached(hub_id: str) -> bool:
    """Whether the hub's cache, or the one of prepared datasets, holds the dataset."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants

    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"
    return downloaded.is_dir() or (Path(HF_DATASETS_CACHE) / hub_id.replace("/", "___")).is_dir()


def stay_offline() -> None:
    """Let this process and its children take what is cached, without the client's retries (20 s for each file)."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if (config := sys.modules.get("datasets.config")) is not None:
        config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
