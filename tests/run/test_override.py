import hypothesis.strategies as st
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from omegaconf import OmegaConf

from mtnrec.run.override import quote_value

# Hydra's grammar has no control characters.
TEXTS = st.text(st.sampled_from("ab/\\\"'${}: ,=é\t") | st.characters(exclude_categories=["C"]))


@given(TEXTS)
def test_hydra_reads_the_text(text):
    override = OverridesParser.create().parse_override(f"key={quote_value(text)}")

    assert OmegaConf.create({"a": 1, "key": override.value()}).key == text


def test_a_plain_path_is_not_quoted():
    assert quote_value("/home/me/runs/table_1/a-b.c") == "/home/me/runs/table_1/a-b.c"
