"""docs/quantisation.md says what its script computes."""

import importlib.util
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


@pytest.mark.slow
def test_errors_of_the_real_weight_are_those_of_the_page(numbers):
    """Within a few per cent: the weight is trained on this machine."""
    on_page = numbers.tables_in(numbers.PAGE.read_text())[numbers.REAL_TABLE]
    rows = numbers.real_error_table().splitlines()[2:]
    for line, expected in zip(rows, on_page.splitlines()[2:], strict=True):
        found, wanted = ([float(x) for x in re.findall(r"(?<=\| )[\d.]+(?= )", row)] for row in (line, expected))
        assert len(wanted) == 2 and found == pytest.approx(wanted, rel=0.15, abs=0.1), line
