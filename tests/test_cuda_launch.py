"""What is launched on a card has the types that its kernels take, as far as the launch itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import interpreter  # noqa: F401  # skips without Triton
from tests.compile_kernels import ONE_ROW
from tests.conftest import ROOT
from tests.test_cuda_compile import OF_A_PROMPT, ROWS


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 90])
def test_what_is_launched_has_the_types_that_kernels_take(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.launch_kernels", str(capability)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {name.removesuffix("_kernel") for name in done.stdout.split()}
    others = {"round", "norm", "row", "stored_row", "attend", "join", *ROWS}
    assert kernels == {*ONE_ROW, *OF_A_PROMPT, *others}
