"""What the command line refuses: one line, before anything is computed, and nothing is left behind."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from holofunc import config, models, train
from holofunc.cli import main
from holofunc.config import Config

ROOT = Path(__file__).parents[2]

BAD = [
    ("", "the following arguments are required: COMMAND"),
    ("tain", "invalid choice: 'tain'"),
    ("train --epoch 5", "unrecognized arguments: --epoch 5"),
    ("train --epochs five", "argument --epochs: invalid int value: 'five'"),
    ("train --epochs 0", "epochs must be at least 1, got 0"),
    ("train --epochs 1 --steps 1", "only one of epochs and steps may be given"),
    ("train --batch-size 0", "batch_size must be at least 1, got 0"),
    ("train --lr 0", "lr must be positive and finite, got 0.0"),
    ("train --lr nan", "lr must be positive and finite, got nan"),
    ("train --lr inf", "lr must be positive and finite, got inf"),
    ("train --weight-decay -1", "weight_decay must be at least 0 and finite"),
    ("train --label-smoothing 1", "label_smoothing must be at least 0 and below 1"),
    ("train --ema 1", "ema must be at least 0 and below 1"),
    ("train --clip 0", "clip must be positive"),
    ("train --seed -1", r"seed must be in \[0, 2\*\*63\), got -1"),
    ("train --log-every 0", "log_every must be at least 1"),
    ("train --precision fp8", "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    ("train --device tpu", "device must be cpu, cuda, .* got 'tpu'"),
    ("train --device cuda:99", "device cuda:99 is not there"),
    ("train --model resnet81", "no model named 'resnet81': did you mean 'resnet18'"),
    ("train --model-options depth=3", "models.smallnet has no option 'depth'"),
    ("train --model-options num_classes=3", "model_options must not hold num_classes: the data decide"),
    ("train --model-options widths", "argument --model-options: must be NAME=VALUE, got 'widths'"),
    ("train --model-options when=2020-01-01", "model_options.when must be a number, text, .* got datetime.date"),
    ("train --model darknet19", "model darknet19 does not take images of 1x8x8: "),
    ("train --optimizer adamm", "optimizer must be one of .*adam, .*sgd.*, got 'adamm'"),
    ("train --optimizer-options b9=3", "optimizer adamw has no option b9; it has b1, b2"),
    ("train --optimizer-options b1=x", "optimizer adamw refuses its options .*b1 must be"),
    ("train --schedule linaer", "schedule must be one of constant, cosine, .* got 'linaer'"),
    ("train --schedule linear(", r"schedule must be a name, or one with options .* got 'linear\('"),
    ("train --schedule step", "schedule step: .*every"),
    ("train --schedule step(evry=3)", "schedule step has no option evry; it has init_value, every, factor"),
    ("train --schedule cosine --warmup soon", "warmup must be a number of updates, '1ep' or '10%', got 'soon'"),
    ("train --schedule cosine --warmup 9ep", "warmup must be shorter than the run of 110 updates, got '9ep'"),
    ("train --augment flip", "augment must be one of .*random_flip.*, got 'flip'"),
    ("train --augment random_flip(p=2)", r"augment random_flip: p must be in \[0, 1\], got 2"),
    ("train --augment mosaic", "augment does not fit these data: "),
    ("train --metrics acuracy", "metrics must be one of accuracy, .*, got 'acuracy'"),
    ("train --metrics accuracy(k=2)", "metrics accuracy has no option k; it has topk"),
    ("train --metrics ssim", "metrics (ssim )?.*"),
    ("train --loss crossentropy", "loss must be one of .*cross_entropy.*, got 'crossentropy'"),
    ("train --loss focal(gama=2)", "loss focal has no option gama; it has "),
    ("train --loss cosine", "loss does not fit these data: "),
    ("train --monitor val/kappa", "monitor must be one of val/loss, .*val/accuracy.* got 'val/kappa'"),
    ("train --monitor val/confusion", "monitor must be one of val/loss, .*val/accuracy, got 'val/confusion'"),
    (
        "train --metrics class_scores --monitor val/class_scores/recall",
        "monitor must be one of .*class_scores/mean_iou",
    ),
    ("train --monitor val/kapa --metrics kappa", "monitor must be one of .*val/kappa, got 'val/kapa'"),
    ("train --mode best", "mode must be one of min, max, got 'best'"),
    ("train --eval-every 0", "eval_every must be a positive number of steps, '2ep', .* got 0"),
    ("train --eval-every never --early-stopping 2", "early_stopping needs evaluations"),
    ("train --save-every 3x", "save_every must be a positive number of steps"),
    ("train --time 3x", "time must be a positive number of seconds"),
    ("train --freeze layer9", "freeze: rule 'layer9' matches none of the parameters"),
    ("train --freeze *", r"freeze must leave something to learn, got all of features, head"),
    ("train --freeze-until layer9", "freeze_until: last must be a layer, such as .*got 'layer9'"),
    ("train --unfreeze layer9=1ep", "unfreeze: rule 'layer9' matches none of the parameters"),
    ("train --unfreeze head=soon", "unfreeze must be a number of updates, '1ep' or '10%', got 'soon'"),
    ("train --unfreeze head", "argument --unfreeze: must be NAME=VALUE, got 'head'"),
    ("train --bad-images keep", "bad_images must be one of stop, skip, got 'keep'"),
    ("train --data=", "data must not be empty"),
    ("train --out=", "out must not be empty"),
    ("train --ranks 2 --rank-timeout 0", "rank_timeout must be a positive number of seconds, got 0"),
    ("train --ranks 0", "ranks must be at least 1, got 0"),
    ("train --ranks 2 --time 3m", "time must not be '3m' on 2 ranks, whose clocks differ"),
    ("train --ranks 3 --batch-size 2", "batch_size must be at least 3, an image for each rank"),
    ("train --resume --overwrite", "only one of them may be given"),
    ("train --task detecting", "task must be one of classification, detection, .*, got 'detecting'"),
    ("train --task detection --data digits", "data must be canvases, shapes, coco:PATH or voc:PATH, got 'digits'"),
    ("train --task detection --images 8 --image-size 32 --loss dice", "loss is the detector's own"),
    ("train --task detection --images 8 --image-size 32 --model resnet18", "model resnet18 is not a detector"),
    ("train --task detection --data coco:empty", "folder 'empty' has no annotations"),
    ("train --task detection --data voc:empty", "folder 'empty' has no Annotations and JPEGImages"),
    ("train --task segmentation --images 8 --image-size 32 --model smallnet", "model smallnet segments no images"),
    ("train --task segmentation --data masks:nowhere", "folder 'nowhere' does not exist"),
    ("train --task segmentation --data masks:empty", "folder 'empty' has no folder images"),
    ("train --task recognition --data text:empty", "folder 'empty' has no labels.txt"),
    ("train --task recognition --data text:empty --image-size 30", "image_size, the width of lines, must be a mult"),
    ("train --task recognition --images 8 --label-smoothing 0.1", "label_smoothing must be 0 for ctc, got 0.1"),
    ("train --task recognition --images 8 --model smallnet", "model smallnet .*no"),
    ("train --data mnist", "data must be digits, cifar10, imagenette or folder:PATH, got 'mnist'"),
    ("train --image-size 8", "image_size must be .* got 8 for 'digits'"),
    ("train --data cifar10 --root nowhere", "cifar10 is not in 'nowhere'"),
    ("train --data folder:nowhere", "folder 'nowhere' does not exist"),
    ("train --data folder:empty", "folder 'empty' needs a folder of images for each class"),
    ("train --data folder:imageless", "folder 'imageless' needs a folder of images for each class"),
    ("train --out file", "cannot write to 'file': '.*file' is a file"),
    ("train --out file/below/it", "cannot write to 'file/below/it': '.*file' is a file"),
    ("train --out empty --resume", "'empty' contains no run: it has no config.toml"),
    ("train --out nowhere --resume", "'nowhere' contains no run"),
    ("train --config nowhere.toml", "No such file or directory: 'nowhere.toml'"),
    ("train --config file", "file: Expected '=' after a key"),
    ("train --config unknown.toml", "unknown.toml: unknown key 'epoch', did you mean 'epochs'?"),
    ("train --config misnamed.toml", "misnamed.toml: optimizer must be one of .*, got 'adamm'"),
    ("train --config misnamed.toml --optimizer adamm", "error: optimizer must be one of .*, got 'adamm'"),
    ("train --config mistyped.toml", "mistyped.toml: lr must be a number, got '0.1'"),
    ("find-lr --start 1 --end 0.1", "start and end must be 0 < start < end, got 1.0 and 0.1"),
    ("find-lr --tries 2", "tries must be an integer of at least 3, got 2"),
    ("evaluate", "the following arguments are required: RUN"),
    ("explain", "the following arguments are required: RUN"),
    ("explain empty --count 0", "count must be at least 1, got 0"),
    ("explain empty", "'empty' contains no run"),
    ("evaluate --run empty", "'empty' contains no run"),
    ("evaluate --run empty --step first", "argument --step: must be best, latest or a number, got 'first'"),
    ("evaluate --run unsaved", "checkpoint 'unsaved' .*"),
    ("predict nowhere.pt2 file", "there is no file 'nowhere.pt2'"),
    ("predict file file", "path must end with .pt2 or .onnx, got 'file'"),
    ("predict file file --batch-size 0", "batch_size must be at least 1, got 0"),
    ("models nothing*", r"no model is named like 'nothing\*'"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line or "nothing" for line, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(line, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("something was computed"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "imageless/cat").mkdir(parents=True)
    (tmp_path / "imageless/dog").mkdir()
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "file").write_text("some text")
    (tmp_path / "unknown.toml").write_text("epoch = 3")
    (tmp_path / "misnamed.toml").write_text("optimizer = 'adamm'")
    (tmp_path / "mistyped.toml").write_text("lr = '0.1'")
    config.write(
        replace(
            Config(epochs=1),
            classes=tuple("0123456789"),
            shape=(1, 8, 8),
            model="smallnet",
            data="digits",
            mean=(0.3,),
            std=(0.4,),
        ),
        tmp_path / "unsaved/config.toml",
    )
    before = sorted(tmp_path.rglob("*"))
    assert re.search(message, refused(line.split()))
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    script = (
        "import os, sys\nfrom holofunc.cli import commands, main\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"
        "sys.exit(main(['train', '--out', 'locked/run']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"cannot write to 'locked/run': permission denied for '.*'", done.stderr)


# --- the program -------------------------------------------------------------------------------------------------


def test_table_of_models(capsys):
    assert main(["models", "resnet1*"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "parameters", "GMACs", "size", "task", "top-1", "weights"]
    assert [row.split()[0] for row in rows] == models.list_models("resnet1*")
    measured = ["93.61%", "imagenette", "resnet18.imagenette"]
    assert rows[-1].split() == ["resnet18", "11,181,642", "1.81", "224", "classification", *measured]
    assert rows[0].split() == ["resnet101", "42,520,650", "7.80", "224", "classification"]


def test_help_is_quick_because_torch_is_not_imported():
    script = (
        "import sys\nfrom holofunc.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name.replace('_', '-')}" in done.stdout for name in ("data", "out", "resume", "label_smoothing"))


def test_program_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "holofunc", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("holofunc: error: argument COMMAND: invalid choice: 'trian'")
