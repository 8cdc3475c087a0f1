"""docs/quantisation.md says what its script computes."""

import importlib.util
import inspect
import itertools
import re

import pytest
import torch

from schemas.compose import CONFIG_ROOT

PATH = CONFIG_ROOT.parent / "docs" / "quantisation_numbers.py"


@pytest.fixture(scope="module")
def numbers():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("quantisation_numbers", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.fix_cpu_dequantization()
    return module


def test_every_table_of_the_page_is_the_output_of_the_script(numbers):
    on_page = numbers.tables_in(numbers.PAGE.read_text())
    assert set(on_page) == {*numbers.TABLES, numbers.REAL_TABLE}
    for name, make in numbers.TABLES.items():
        assert on_page[name] == make(), name


def test_a_changed_number_is_written_back(numbers):
    page = numbers.PAGE.read_text()
    spoiled = page.replace("4.127", "4.000")
    assert numbers.with_tables(spoiled, {"bits": numbers.bits_table()}) != spoiled
    assert numbers.with_tables(page, {"bits": numbers.bits_table()}) == page


def test_the_formula_gives_the_levels_of_bitsandbytes(numbers):
    levels = numbers.nf4_levels()
    assert torch.allclose(levels, numbers.nf4_levels_by_formula().float(), atol=2e-7)
    assert (levels > 0).sum() == 8 and (levels < 0).sum() == 7 and 0.0 in levels


def test_only_states_of_tensors_of_the_documented_size_are_paged(numbers):
    """bitsandbytes' own condition; the branch behind it needs a GPU."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert numbers.examples.PAGED_FROM_VALUES == 1e5
    assert "if not self.is_paged or p.numel() < 1e5:" in inspect.getsource(Optimizer8bit.get_state_buffer)


def test_shapes_of_the_adapter_are_those_of_peft(numbers):
    from peft import LoraConfig, inject_adapter_in_model

    n_in, n_out = numbers.examples.SHAPE_10B.linears["k_proj"]
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"k_proj": torch.nn.Linear(n_in, n_out, bias=False)})
        inject_adapter_in_model(LoraConfig(r=numbers.examples.LORA_R, target_modules=["k_proj"]), model)
    layer = model["k_proj"]
    a, b = (tuple(part["default"].weight.shape) for part in (layer.lora_A, layer.lora_B))
    row = next(line for line in numbers.TABLES["lora"]().splitlines() if "k_proj" in line)
    assert [f"{x:,} x {y:,}" for x, y in ((n_out, n_in), a, b)] == row.split(" | ")[1:4]


def test_bytes_that_bitsandbytes_holds_are_the_bits_that_are_counted(numbers):
    last_row = numbers.TABLES["constantbytes"]().splitlines()[-1]
    measured = [float(bits) for bits in re.findall(r"0\.\d{4}", last_row)]
    counted = [numbers.examples.BITS["NF4, float32 scales"] - 4, numbers.examples.BITS[numbers.examples.NF4_DOUBLE] - 4]
    assert measured == pytest.approx(counted, abs=1e-4)


@pytest.mark.slow
def test_errors_of_the_real_weight_are_those_of_the_page(numbers):
    """The weight is trained on this machine: equal within a few per cent as it is; with a dozen outliers that hit other
    values on every machine, the schemes keep their order."""

    def errors(table: str) -> list[tuple[float, float]]:
        rows = [re.findall(r"(?<=\| )[\d.]+(?= )", line) for line in table.splitlines()[2:]]
        return [(float(plain), float(with_outliers)) for plain, with_outliers in rows]

    on_page = errors(numbers.tables_in(numbers.PAGE.read_text())[numbers.REAL_TABLE])
    found = errors(numbers.real_error_table())
    assert len(found) == len(numbers.SCHEMES)
    assert [plain for plain, _ in found] == pytest.approx([plain for plain, _ in on_page], rel=0.15, abs=0.1)
    for i, j in itertools.permutations(range(len(found)), 2):
        if on_page[i][1] > 1.3 * on_page[j][1]:
            assert found[i][1] > found[j][1], (i, j)
