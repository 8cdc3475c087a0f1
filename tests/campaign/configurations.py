"""Mutated configurations: each is refused in words or valid, and a sample of the valid ones trains for two steps."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from schemas.compose import JOB_OF_A_SWEEP
from tests.campaign import mutations
from tests.campaign.child import Call
from tests.campaign.lab import Lab, Program
from tests.campaign.tally import Tally

_TRAINED_FRAC = 0.2
"""Of the mutated configurations; a mutation may ask for a large run, which is stopped at the limits below."""
_LIMIT_S, _LIMIT_BYTES = 60.0, 12 * 1024**3
_TOO_LARGE = ("can't allocate memory", "MemoryError", "bad allocation", "std::bad_alloc")


def mutate_and_check(lab: Lab, tally: Tally, program: Program, num_mutations: int) -> None:
    outcomes = lab.base / f"outcomes {program.name}.jsonl"
    method = "masked_diffusion" if program.words[0].endswith("llada_tiny") else "rlt"
    lab.starter.call_function(check_all, method, lab.random(f"mutations {method}").random(), num_mutations, outcomes)
    found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    for outcome in found:
        crashed = outcome["kind"] == "crashed"
        tally.count(f"{method}, {outcome['changes']}", [outcome["text"]] * crashed)
    valid = [outcome for outcome in found if outcome["kind"] == "valid"]
    chosen = valid[: max(1, round(_TRAINED_FRAC * num_mutations))]
    tally.notes = {"refused": sum(o["kind"] == "refused" for o in found), "valid": len(valid), "trained": len(chosen)}
    lab.each(chosen, lambda outcome: _train(lab, tally, program, outcome))


def check_all(method: str, seed: float, num_mutations: int, outcomes: Path) -> None:
    """Validate mutations of a method, in a forked process; one JSON object for each in `outcomes`."""
    of_method = (mutation for mutation in mutations.mutations(seed) if mutation[0] == method)
    with open(outcomes, "w") as file:
        for mutation in islice(of_method, num_mutations):
            outcome = mutations.validate(mutation, outcomes.parent / "unused")
            line = {"changes": repr(mutation[1]), "kind": outcome.kind, "text": outcome.text}
            if outcome.kind == "valid":
                line["values"] = mutations.mutated_values(mutation, Path("run"))
            file.write(json.dumps(line, default=str) + "\n")


def _train(lab: Lab, tally: Tally, program: Program, outcome: dict[str, Any]) -> None:
    """Two steps: trained, or refused in words before; never a traceback."""
    trial = lab.trial(program)
    here = dict(word.split("=", 1) for word in lab.words_of(program))
    small = {key: path for key, path in here.items() if outcome["values"][key] in ("tiny", "arithmetic")}
    values = trial.folder / "values.json"
    values.write_text(json.dumps(outcome["values"] | small))
    call = Call(words=(JOB_OF_A_SWEEP,), folder=trial.folder, stdin=values, limit_bytes=_LIMIT_BYTES)
    ended = lab.starter.fork(call).end(_LIMIT_S)
    if ended.status is None or any(words in ended.says for words in _TOO_LARGE):
        return trial.remove()
    problems = [f"status {ended.status}:\n{ended.last_lines}"] if ended.status not in (0, 2) else []
    problems += [f"a traceback:\n{ended.last_lines}"] if ended.num_tracebacks else []
    tally.count(f"{program.name}, {trial.folder}, trained with {outcome['changes']}", problems)
    if not problems:
        trial.remove()
