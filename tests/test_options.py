"""The command line of both scripts: numbers, presets, --predict, the device, the way out."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

import temp_forecast
import text_classify
from support import options
from support.files import UserError

WRONG_NUMBERS = "--epochs=0 --epochs=1.5 --seed=-1 --lr=0 --lr=inf --dropout=1 --dropout=nan"


@pytest.mark.parametrize("argument", WRONG_NUMBERS.split())
def test_a_number_out_of_range_is_refused_with_its_option(argument):
    option, _ = argument.split("=")
    with pytest.raises(UserError, match=option):
        text_classify.parse_args([argument])


@pytest.mark.parametrize("script", [text_classify, temp_forecast])
def test_help_shows_all_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert help_text.count("(default: ") == len(vars(script.parse_args([])))


def test_the_earlier_name_of_a_cell_is_accepted():
    assert text_classify.parse_args(["--model", "bilstm"]).model == "bi_lstm"


# --- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [text_classify, temp_forecast])
def test_a_preset_sets_several_options(script):
    args = script.parse_args(["--preset", "lab"])
    assert args.lr == 0.001
    assert args.average == 0


@pytest.mark.parametrize("value", [0.5, text_classify.parse_args([]).lr])
def test_a_typed_option_wins_over_the_preset_even_with_the_ordinary_default(value):
    args = text_classify.parse_args(["--lr", str(value), "--preset", "lab"])
    assert args.lr == value


# --- prediction ---------------------------------------------------------------------------------

PREDICT = ["--predict", "好", "--checkpoint", "best.pt"]


def test_predict_and_device_go_together():
    args = text_classify.parse_args([*PREDICT, "--device", "cpu"])
    assert args.predict == "好"


@pytest.mark.parametrize("arguments", [["--batch-size", "63"], ["--resume"]])
def test_an_option_without_effect_on_predict_is_refused(arguments):
    with pytest.raises(UserError, match=f"^leave out {arguments[0]}: no effect on --predict"):
        text_classify.parse_args([*PREDICT, *arguments])


@pytest.mark.parametrize("arguments", [PREDICT[:2], PREDICT[2:]])
def test_predict_and_checkpoint_belong_together(arguments):
    with pytest.raises(UserError, match="belong together"):
        text_classify.parse_args(arguments)


# --- device -------------------------------------------------------------------------------------


@pytest.fixture
def broken_gpu(monkeypatch):
    """A GPU that is there, but on which no operation works."""
    error = RuntimeError("no kernel image\nCompile with another flag")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))


def test_auto_falls_back_to_the_cpu_with_one_line(broken_gpu, capsys):
    assert options.pick_device("auto") == torch.device("cpu")
    stderr = capsys.readouterr().err
    assert stderr.endswith("no kernel image\n")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_typed_gpu_that_does_not_work_is_refused(broken_gpu, name):
    with pytest.raises(UserError, match=f"--device {name} does not work here: no kernel image"):
        options.pick_device(name)


def test_under_torchrun_no_process_falls_back_to_the_cpu(broken_gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device auto does not work here"):
        options.pick_device("auto")


def test_under_torchrun_a_numbered_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="would be the GPU of all processes"):
        options.pick_device("cuda:0")


def test_without_a_gpu_auto_is_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert options.pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:01"])
def test_a_name_that_is_no_device_is_refused(name):
    with pytest.raises(UserError, match="is not one of auto, cpu, cuda, cuda:N"):
        options.pick_device(name)


NAMES = {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_without_a_number_is_the_processs_own_gpu(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", Mock())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert options.pick_device(name) == torch.device(NAMES[name])


# --- errors at the end --------------------------------------------------------------------------


def exit_status_of(error):
    """The exit status of a script whose main raises this error."""
    with pytest.raises(SystemExit) as stop:
        options.run_script(Mock(side_effect=error))
    return stop.value.code


def test_a_mistake_of_the_user_ends_with_one_line(capsys):
    assert exit_status_of(UserError("two\nlines")) == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_full_disk_ends_with_one_line(capsys):
    assert exit_status_of(OSError(28, "No space left on device")) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_reader_who_has_gone_away_ends_a_script_with_one_line(pytestconfig):
    script = "from support import options; options.run_script(lambda: print('好'))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=pytestconfig.rootpath,
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert result.returncode == 2
    assert result.stderr.decode().splitlines() == ["error: [Errno 32] Broken pipe"]


def test_redirected_output_is_utf_8(pytestconfig):
    script = "from support import options; options.run_script(lambda: print('好'))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=pytestconfig.rootpath,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert result.stdout.decode("utf-8").strip() == "好"


def test_an_interrupted_script_tells_how_to_go_on(capsys):
    assert exit_status_of(KeyboardInterrupt()) == 130
    assert "--resume" in capsys.readouterr().err


FULL_MEMORY = [
    MemoryError(),  # of NumPy
    RuntimeError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory"),  # on Windows
]


@pytest.mark.parametrize("error", FULL_MEMORY)
def test_a_full_memory_ends_with_advice(error, capsys):
    assert exit_status_of(error) == 2
    assert "lower --batch-size" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"):
        options.run_script(Mock(side_effect=RuntimeError("shapes differ")))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match="use another --out"):
        options.check_folder(path / "runs")
