import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from wrong_use import WRONG_USES, outcome


@pytest.mark.parametrize("case", WRONG_USES, ids=[case.title.replace(" ", "-") for case in WRONG_USES])
def test_wrong_use_gets_one_clear_error_and_leaves_nothing(case, tmp_path):
    text = outcome(case, tmp_path)
    assert len(text) < 600 and "Traceback" not in text
