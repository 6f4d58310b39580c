"""Whole evaluations: the same on any number of processes, with references read once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import TESTS, environment
from PIL import Image
from torch import nn

from cm_diffusers.cli import main
from cm_diffusers.evaluation import Evaluator, Features, Reference, Report, Sampler, load_features
from cm_diffusers.evaluation import features as features_module
from cm_diffusers.evaluation import reference as reference_module
from cm_diffusers.evaluation.classifier import DomainClassifier
from cm_diffusers.evaluation.features import check_features
from cm_diffusers.evaluation.neighbours import nearest
from cm_diffusers.evaluation.plots import plot_training
from cm_diffusers.evaluation.reference import reference_features
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.training.data import prepare_dataset
from cm_diffusers.training.images import ImageSpec

REAL = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


class Patches(nn.Module):
    """Means of the quarters of each channel, and three logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        means = nn.functional.adaptive_avg_pool2d(images.float() * self.weight, 2).flatten(1)
        return means, means[:, :3] / 50


def sampler(shift=0.0):
    def draw(seeds):
        noise = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (torch.stack(noise) * 200 + shift).to(torch.uint8)

    return Sampler("student", "test", 1, draw)


def evaluator(network=None, reference=None, **changes):
    arguments = {"num_images": 50, "batch_size": 16, **changes}
    return Evaluator(load_features(network or Patches()), reference or Reference(REAL, "noise"), **arguments)


def test_figures_do_not_depend_on_the_batch_size():
    one, other = (evaluator(batch_size=size).measure(sampler()) for size in (50, 7))
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6)
    assert set(one.metrics) == {"fid", "kid", "precision", "recall", "density", "coverage", "inception_score"}
    assert one.seconds_per_1000 > 0


def test_fid_alone_is_the_same():
    assert evaluator().fid(sampler()) == evaluator().measure(sampler()).metrics["fid"]
    assert evaluator(repeats=2).fid(sampler()) == evaluator().fid(sampler())


def test_repetitions_use_other_seeds():
    result = evaluator(repeats=3, num_images=20).measure(sampler())
    assert result.repeats == 3
    assert result.spread["fid"] > 0
    singles = [
        Evaluator(load_features(Patches()), Reference(REAL, "noise"), 20).measure(
            Sampler("s", "s", 1, lambda seeds, first=first: sampler().draw([first + seed for seed in seeds]))
        )
        for first in (0, 20, 40)
    ]
    assert result.metrics["fid"] == pytest.approx(sum(single.metrics["fid"] for single in singles) / 3)


def test_any_number_of_processes_gives_the_same(tmp_path):
    """Whatever their caches hold; what goes wrong on one, all say. See the end of this file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    done = subprocess.run(
        [*launcher, __file__, str(tmp_path)], timeout=120, capture_output=True, text=True,
        env=environment(PYTHONPATH=f"{TESTS}:{TESTS.parent}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert "cannot be kept in" in done.stderr
    alone = evaluator(num_images=31, batch_size=4).measure(sampler())
    for name in ("computed", "kept", "not to be kept"):
        found = Report.load(tmp_path / f"{name}.json").results[0]
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-5)
        assert found.protocol == alone.protocol


def test_a_reference_is_seen_once_whoever_asks(cache):
    network = Patches()
    first = evaluator(network, num_images=10)
    first.measure(sampler())
    assert network.seen == 60 + 10
    first.measure(sampler())
    assert network.seen == 60 + 2 * 10
    # The first batch tells whether what is kept still holds.
    evaluator(network, Reference(REAL.clone(), "the same pixels"), num_images=10).measure(sampler())
    assert network.seen == 60 + 16 + 3 * 10
    evaluator(network, Reference(REAL[:59], "fewer"), num_images=10).measure(sampler())
    assert network.seen == 60 + 59 + 16 + 4 * 10
    network.weight.data += 1  # another network
    evaluator(network, num_images=10).measure(sampler())
    assert network.seen == 2 * 60 + 59 + 16 + 5 * 10
    assert len(list(cache.iterdir())) == 3


def test_features_of_code_that_changed_are_made_anew(caplog):
    class Means(nn.Module):
        scale = 1.0

        def forward(self, images):
            return images.float().mean((2, 3)) * self.scale

    network = Means()
    reference_features(load_features(network), Reference(REAL, "noise"), 16)
    Means.scale = 1 / 255  # neither the weights nor the source of the class show it
    found = reference_features(load_features(network), Reference(REAL, "noise"), 16)
    torch.testing.assert_close(found, REAL.float().mean((2, 3)) / 255)
    assert "is not what the network gives now" in caplog.text


def test_the_source_of_a_network_is_part_of_its_digest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, factor in (("net_one", 1), ("net_same", 1), ("net_other", 2)):
        lines = "import torch", "class Net(torch.nn.Module):", f"    def forward(self, x): return {factor} * x"
        (tmp_path / f"{name}.py").write_text("\n".join(lines))
    one, same, other = (load_features(f"{name}:Net").digest for name in ("net_one", "net_same", "net_other"))
    assert one == same != other


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CM_DIFFUSERS_CACHE", str(tmp_path / "file"))
    assert len(reference_features(load_features(Patches()), Reference(REAL, "noise"), 16)) == 60
    assert "cannot be kept in" in caplog.text


def test_a_limited_reference_is_spread_over_the_data():
    images = torch.linspace(-1, 1, 11).reshape(11, 1, 1, 1).expand(-1, 1, 4, 4)
    dataset = prepare_dataset(images, ImageSpec(1, 4, 4))
    values = [Reference.from_dataset(dataset, "ramp", limit).images[:, 0, 0, 0].tolist() for limit in (3, None, 99)]
    assert values[0] == [0, 128, 255]
    assert values[1] == values[2] and len(values[1]) == 11
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
            Reference.from_dataset(dataset, "ramp", limit)


def test_images_that_cannot_be_read_are_left_out():
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(-1, 1, 4, 4).clone() / 5 * 2 - 1
    images[2] = images[5] = float("nan")
    dataset = prepare_dataset(images, ImageSpec(1, 4, 4), on_bad_image="skip")
    found = Reference.from_dataset(dataset, "ramp").images
    assert found[:, 0, 0, 0].tolist() == [0, 51, 153, 204]


def test_images_of_a_diverged_model_have_no_figures():
    def draw(seeds):
        return eight_bits(torch.full((len(seeds), 3, 8, 8), float("nan")), (-1, 1))

    with pytest.raises(FloatingPointError, match="not finite"):
        evaluator().measure(Sampler("student", "test", 1, draw))


def test_a_damaged_cache_is_made_anew(cache, caplog):
    features, reference = load_features(Patches()), Reference(REAL, "noise")
    whole = reference_features(features, reference, 16)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(reference_features(features, reference, 16), whole)
    assert "is made anew" in caplog.text
    assert torch.equal(reference_features(features, reference, 16), whole)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) cannot be compared with a reference of \(3, 8, 8\)"):
        evaluator().measure(Sampler("s", "s", 1, lambda seeds: torch.zeros(len(seeds), 3, 4, 4, dtype=torch.uint8)))


@pytest.mark.parametrize("changes", [{"num_images": 1}, {"repeats": 0}, {"batch_size": 0}])
def test_senseless_numbers_are_refused(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be at least"):
        evaluator(**changes)
    with pytest.raises(ValueError, match="two images at least"):
        evaluator(reference=Reference(REAL[:1], "one"))


# Feature networks


def test_inception_comes_with_its_own_weights_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / features_module.INCEPTION_URL.rsplit("/", 1)[1]

    def download(url, destination, hash_prefix):
        assert hash_prefix == features_module.INCEPTION_SHA256
        torch.save({}, destination)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="does not hold Inception's weights: its SHA-256 is"):
        load_features("inception")
    import hashlib

    monkeypatch.setattr(features_module, "INCEPTION_SHA256", hashlib.sha256(place.read_bytes()).hexdigest())
    inception = load_features("inception")
    grey = REAL[:2, :1]
    found, logits = inception(grey)
    assert found.shape == (2, 2048) and logits.shape == (2, 1008)
    torch.testing.assert_close(inception(grey.expand(-1, 3, -1, -1))[0], found)


def test_a_classifier_is_learned_and_kept(tmp_path):
    labels = torch.arange(200) % 2
    images = (torch.rand(200, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 60).to(torch.uint8)
    images[labels == 1, :, :6] += 120
    classifier = DomainClassifier.fit(images, labels, steps=40, batch_size=32, width=8)
    assert classifier.accuracy(images, labels) > 0.95
    again = DomainClassifier.fit(images, labels, steps=40, batch_size=32, width=8)
    classifier.save(tmp_path / "classifier")
    kept = load_features(tmp_path / "classifier")
    assert kept.digest == Features(classifier, "").digest == Features(again, "").digest
    assert kept.name == "classifier classifier"
    torch.testing.assert_close(kept(images)[0], classifier(images)[0])
    assert kept(images)[0].abs().max() <= 1


def test_a_damaged_classifier_is_named(tmp_path):
    DomainClassifier(1, 8, 2, width=8).save(tmp_path)
    weights, settings = tmp_path / "classifier.safetensors", tmp_path / "classifier.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="holds no classifier"):
        load_features(tmp_path)
    weights.write_bytes(whole)
    settings.write_text(settings.read_text().replace('"width": 8', '"width": 16'))
    with pytest.raises(ValueError, match="holds no classifier"):
        load_features(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [("vgg", "must be 'inception'"), ("no.such:thing", "cannot be imported"), (3, "must be 'inception'")],
)
def test_what_gives_no_features_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_features(source)


def test_a_function_gives_a_network():
    assert isinstance(load_features("test_evaluate:Patches").network, nn.Module)
    with pytest.raises(TypeError, match="must give a torch network"):
        load_features("json:JSONDecoder")


def test_features_take_eight_bits_only():
    with pytest.raises(TypeError, match="in uint8, got torch.float32"):
        load_features(Patches())(torch.zeros(1, 3, 8, 8))


OUTPUTS = {
    "2 of them have features of shape \\(1, 3\\)": lambda images: images[:1].float().mean((2, 3)),
    "2 of them have features of shape \\(2, 0\\)": lambda images: images[:, :0].float(),
    "2 of them have logits of shape \\(2,\\)": lambda images: (images.float(), images.float().mean((1, 2, 3))),
    "pair of them and logits, got a dict": lambda images: {"features": images},
    "pair of them and logits, got a tuple": lambda images: (images, images, images),
    "must be of shape \\(batch, d\\), got \\(2,\\)": lambda images: images.float().mean((1, 2, 3)),
    "not finite": lambda images: images.float().log(),
    "ZeroDivisionError$": lambda images: exec("raise ZeroDivisionError"),
}


@pytest.mark.parametrize("message", OUTPUTS)
def test_what_does_not_fit_the_images_is_known_from_two_of_them(message):
    class Network(nn.Module):
        def forward(self, images):
            return OUTPUTS[message](images)

    refusal = r"The features 'Network' do not fit images of shape \(3, 8, 8\)"
    with pytest.raises(ValueError, match=f"^{refusal}: .*{message}"):
        check_features(load_features(Network()), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_trying_a_network_uses_no_random_numbers_up():
    class Noisy(nn.Module):
        def forward(self, images):
            return torch.rand(len(images), 3)

    state = torch.get_rng_state()
    check_features(load_features(Noisy()), REAL[:2])
    assert torch.equal(torch.get_rng_state(), state)


# Neighbours and pictures


def test_copies_are_found():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 8, generator=generator)
    fresh, copied = torch.randn(50, 8, generator=generator), reference[100:150] + 1e-3
    assert nearest(fresh, reference).share_of_copies == 0
    found = nearest(torch.cat([fresh, copied]), reference)
    assert found.share_of_copies == 0.5
    assert found.rows[50:, 0].tolist() == list(range(100, 150))
    assert (found.distances.diff(dim=1) >= 0).all()


def test_training_is_plotted(tmp_path):
    plot_training([{"step": s, "nfe": n, "fid": 10.0 / s / n} for s in (1, 2, 3) for n in (1, 2)], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (900, 600)


def test_training_is_plotted_under_one_protocol(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *line, **how: drawn.append(line) or plot(self, *line, **how))
    history = [{"step": s, "nfe": 1, "fid": 1.0, "protocol": {"num_images": 10 * (s > 1)}} for s in (1, 2, 3)]
    plot_training(history, tmp_path / "a.png")
    assert drawn == [((2, 3), (1.0, 1.0))]


# The command


@pytest.fixture
def workspace(tmp_path):
    import diffusers
    from conftest import build_unet

    from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler

    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(prediction_type="v_prediction"))
    ConsistencyPipeline(build_unet(), scheduler).save_pretrained(tmp_path / "student")
    diffusers.DDPMPipeline(build_unet(seed=1), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 10, 10, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def test_evaluate_writes_a_report_and_adds_to_it(workspace, capsys, monkeypatch):
    command = [
        "evaluate", str(workspace / "student"), "--dataset", str(workspace / "images"), "--num_images", "12",
        "--features", "test_evaluate:Patches", "--output_dir", str(workspace / "out"),
    ]  # fmt: skip
    main([*command, "--nfes", "1", "2", "--teacher", str(workspace / "teacher"), "--teacher_nfes", "3"])
    printed = capsys.readouterr().out
    assert "| teacher | Heun, sigma 0.01 to 80 | 3 |" in printed
    assert "12 images (3 x 8 x 8, 8 bits) against 30 of images/train" in printed
    (workspace / "student" / "evaluation.jsonl").write_text('{"step": 5, "nfe": 1, "fid": 3.0}\n')
    main([*command, "--nfes", "4"])
    report = Report.load(workspace / "out" / "report.json")
    assert [r.nfe for r in report.of("student")] == [1, 2, 4]
    assert {path.name for path in (workspace / "out").iterdir()} == {
        "report.json", "report.md", "fid.png", "training.png", "neighbours.png", "samples-student-nfe-1.png",
        "samples-student-nfe-2.png", "samples-student-nfe-4.png", "samples-teacher-nfe-3.png",
    }  # fmt: skip
    assert "Nearest reference images of 64 samples" in (workspace / "out" / "report.md").read_text()
    monkeypatch.setattr(Evaluator, "measure", None)  # what cannot be added is not drawn
    with pytest.raises(SystemExit, match="different protocols cannot stand in one table: num_images: 12 and 13"):
        main([*command, "--nfes", "1", "--num_images", "13"])
    weights = workspace / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes((workspace / "teacher" / "unet" / weights.name).read_bytes())
    with pytest.raises(SystemExit, match="has figures of another student"):
        main([*command, "--nfes", "1"])
    assert len(json.loads((workspace / "out" / "report.json").read_text())) == 4


@pytest.mark.parametrize("option", ["--num_images=1", "--num_reference=0", "--num_reference=-3", "--repeats=0",
                                    "--nfes=0", "--batch_size=x", "--teacher_nfes=-1"])  # fmt: skip
def test_senseless_numbers_end_the_command(option):
    with pytest.raises(SystemExit, match=f"{option.split('=')[0]}: must be a whole number of at least"):
        main(["evaluate", "student", "--dataset", "images", option])


def test_the_teacher_is_the_one_that_is_named(workspace, monkeypatch):
    def load_teacher(*arguments):
        raise ValueError(f"loads {arguments}")

    monkeypatch.setattr("cm_diffusers.training.teacher.load_teacher", load_teacher)
    with pytest.raises(SystemExit, match=r"loads \('me/teacher', 'v1', 'sample'\)"):
        main([
            "evaluate", str(workspace / "student"), "--dataset", str(workspace / "images"),
            "--features", "test_evaluate:Patches", "--teacher", "me/teacher", "--teacher_revision", "v1",
            "--teacher_prediction_type", "sample",
        ])  # fmt: skip


def test_what_a_teacher_cannot_draw_is_refused_before_the_reference_is_read(workspace, monkeypatch):
    read = []
    monkeypatch.setattr(reference_module, "eight_bits", lambda *image: read.append(image) or eight_bits(*image))
    with pytest.raises(SystemExit, match="an odd number of evaluations of at least 1, got 4"):
        main([
            "evaluate", str(workspace / "student"), "--dataset", str(workspace / "images"), "--nfes", "1",
            "--features", "test_evaluate:Patches", "--teacher", str(workspace / "teacher"), "--teacher_nfes", "4",
        ])  # fmt: skip
    assert read == []


def test_a_stream_needs_a_number(workspace):
    with pytest.raises(SystemExit, match="set the number of reference images"):
        main(["evaluate", str(workspace / "student"), "--dataset", str(workspace / "images"), "--streaming",
              "--features", "test_evaluate:Patches"])  # fmt: skip


@pytest.mark.parametrize("command", ["evaluate", "timesteps"])
def test_features_that_do_not_fit_are_one_line_before_the_reference_is_read(workspace, monkeypatch, command):
    DomainClassifier(1, 8, 2, width=8).save(workspace / "clf1")
    read = []
    monkeypatch.setattr(reference_module, "eight_bits", lambda *image: read.append(image) or eight_bits(*image))
    message = r"features 'classifier clf1' do not fit images of shape \(3, 8, 8\): .*to have 1 channels"
    with pytest.raises(SystemExit, match=f"^cm-diffusers {command}: error: The {message}"):
        main([command, str(workspace / "student"), "--dataset", str(workspace / "images"),
              "--features", str(workspace / "clf1")])  # fmt: skip
    assert len(read) == 2


def nan_in_image_1(seeds):
    images = [torch.full((3, 8, 8), float("nan") if seed == 1 else 0.0) for seed in seeds]
    return eight_bits(torch.stack(images), (-1, 1))


if __name__ == "__main__":
    from accelerate import PartialState

    from cm_diffusers.training.runtime import disconnect

    state, folder = PartialState(cpu=True), Path(sys.argv[1])
    (folder / "file").touch()
    own = str(folder / f"cache-{state.process_index}")  # as on hosts of their own: only the main one finds something
    for name, place in (("computed", own), ("kept", own), ("not to be kept", str(folder / "file"))):
        os.environ["CM_DIFFUSERS_CACHE"] = place
        report = Report([evaluator(num_images=31, batch_size=4).measure(sampler())])
        if state.is_main_process:
            report.save(folder / f"{name}.json")
    with pytest.raises(ValueError, match="do not have the same reference images"):
        evaluator(reference=Reference(REAL[state.process_index :], "other")).measure(sampler())
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluator().measure(Sampler("student", "test", 1, nan_in_image_1))
    disconnect(state)
