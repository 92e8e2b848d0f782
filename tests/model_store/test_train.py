"""The demo model's recipe: its losses against plain loops, its crops against their labels, and a tiny run."""

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model_store.demo.held_out import HeldOut, hold_out
from model_store.demo.losses import distillation_loss, enlarge, lovasz_softmax, segmentation_loss
from model_store.demo.networks import Student, build_segmenter
from model_store.demo.pictures import IGNORE, Augmentation, Pictures, cut_out, paste_things
from model_store.demo.scene import CAR, ROAD
from model_store.demo.train import learning_rate, parse_recipe, take_step, train
from mpm_ops import InferenceConfig
from mpm_ops.evaluate import DATASETS, mean_iou, picture_row
from mpm_ops.models import load_segmenter

STEADY = Augmentation(zoom=1.0, squeeze=1.0, turn=0.0, painted=0, pasted=0, blended=0)
WILD = Augmentation(zoom=2.0, squeeze=1.2, turn=0.1, painted=0, pasted=0.5, blended=0.5)
CHECKPOINT = Path(__file__).resolve().parents[2] / "model_store/demo/checkpoint.pth"


@pytest.fixture
def pairs(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Four pictures of two sequences in which the red channel is 20 times the label."""
    random = np.random.default_rng(0)
    found = []
    for name in ("a_1", "a_2", "b_1", "b_2"):
        labels = np.kron(random.integers(0, IGNORE + 1, (4, 6)), np.ones((16, 16))).astype(np.uint8)
        image, label = (tmp_path / "train" / kind / f"{name}.png" for kind in ("images", "labels"))
        for path, array in ((image, np.dstack([20 * labels, labels, labels])), (label, labels)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        found.append((image, label))
    return found


def make_pictures(pairs: list[tuple[Path, Path]], num_scenes: int = 0) -> Pictures:
    return Pictures(pairs, num_scenes=num_scenes, num_workers=1, device="cpu", seed=0)


class TestLosses:
    def test_lovasz_is_the_extension_of_the_jaccard_loss(self) -> None:
        """At hard predictions it is 1 - IoU, averaged over the classes that occur."""
        random = np.random.default_rng(1)
        truth, predicted = (torch.from_numpy(part) for part in random.integers(0, 3, (2, 200)))
        hard = F.one_hot(predicted, 4).T.float()
        loss = lovasz_softmax(hard, truth)
        ious = [((truth == k) & (predicted == k)).sum() / ((truth == k) | (predicted == k)).sum() for k in range(3)]
        assert loss == pytest.approx(1 - np.mean(ious), abs=1e-5)

    def test_lovasz_of_soft_predictions(self) -> None:
        """Against a plain walk over the sorted errors of one class."""
        torch.manual_seed(2)
        probabilities, labels = torch.rand(3, 40), torch.randint(0, 3, (40,))
        losses = []
        for k in range(3):
            errors = sorted(
                ((abs(float(t == k) - float(p)), bool(t == k)) for p, t in zip(probabilities[k], labels, strict=True)),
                reverse=True,
            )
            size, missed, added, before, loss = sum(own for _, own in errors), 0, 0, 0.0, 0.0
            for error, own in errors:
                missed, added = missed + own, added + (not own)
                jaccard = 1 - (size - missed) / (size + added)
                loss, before = loss + error * (jaccard - before), jaccard
            losses.append(loss)
        assert lovasz_softmax(probabilities, labels) == pytest.approx(np.mean(losses), abs=1e-5)

    def test_unknown_pixels_make_no_difference(self) -> None:
        torch.manual_seed(3)
        probabilities, labels = torch.rand(3, 50), torch.randint(0, 3, (50,))
        known = lovasz_softmax(probabilities[:, :40], labels[:40])
        labels[40:] = 3
        assert lovasz_softmax(probabilities, labels) == pytest.approx(float(known), abs=1e-6)

    def test_nothing_known(self) -> None:
        logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        loss = segmentation_loss(logits, torch.full((2, 64, 64), 3), torch.ones(3))
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert not logits.grad.any()

    def test_cross_entropy_follows_the_labels(self) -> None:
        labels = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
        right = 8 * F.one_hot(labels[:, ::16, ::16], 3).permute(0, 3, 1, 2).float()
        weights = torch.tensor([1.0, 2.0, 0.5])
        assert segmentation_loss(right, labels, weights) < 0.5 * segmentation_loss(-right, labels, weights)

    def test_distillation(self) -> None:
        torch.manual_seed(4)
        answers = torch.randn(1, 3, 8, 8)
        assert distillation_loss(answers, answers) == pytest.approx(0, abs=1e-6)
        assert distillation_loss(answers + 5, answers) == pytest.approx(0, abs=1e-5)
        assert distillation_loss(-answers, answers) > 0.1

    @pytest.mark.parametrize("size", [(8, 8), (5, 7), (32, 16)])
    def test_enlarging_is_bilinear(self, size: tuple[int, int]) -> None:
        logits = torch.randn(2, 3, 5, 7)
        expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(enlarge(logits, size), expected)


class TestCrops:
    def test_labels_stay_with_their_pixels(self, pairs: list[tuple[Path, Path]]) -> None:
        """Red says the label, wherever scaling, turning and flipping put a pixel, away from the edges."""
        torch.manual_seed(0)
        pictures = make_pictures(pairs)
        windows, labels = pictures._warp(*pictures._choose(16, WILD), 96, WILD)
        red = (windows[:, 0] + 1) * 127.5 / 20
        inside = (red - red.round()).abs() < 1e-3
        inside &= (red[:, None] - F.unfold(red[:, None], 5, padding=2).unflatten(2, (96, 96))).abs().amax(1) < 1e-3
        outside = (windows == 0).all(1)
        assert (labels[outside] == IGNORE).all()
        assert (inside & ~outside).float().mean() > 0.2
        assert torch.equal(red.round().long()[inside & ~outside], labels[inside & ~outside])

    def test_a_steady_crop_is_a_window_of_inference(self, pairs: list[tuple[Path, Path]]) -> None:
        """Without augmentation, the 64-pixel side of a picture fills a window of 512 pixels."""
        _, labels = make_pictures(pairs)._warp(torch.tensor([2]), torch.tensor([[48.0, 32.0]]), 512, STEADY)
        found, picture = labels[0, 4::8, 4::8].numpy(), np.array(Image.open(pairs[2][1]))
        windows = [picture[:, left : left + 64] for left in range(33)]
        assert any(np.array_equal(found, side) for window in windows for side in (window, window[:, ::-1]))

    def test_batches(self, pairs: list[tuple[Path, Path]]) -> None:
        torch.manual_seed(0)
        windows, labels = make_pictures(pairs).batch(6, 64, WILD)
        assert (windows.shape, labels.shape, labels.dtype) == ((6, 3, 64, 64), (6, 64, 64), torch.int64)
        assert windows.abs().max() <= 1
        assert labels.min() >= 0
        assert (labels[:3] == IGNORE).all()  # blends
        assert (labels[3:] != IGNORE).any()

    def test_things_are_pasted_with_their_labels(self) -> None:
        torch.manual_seed(0)
        things = torch.arange(IGNORE + 1) == CAR
        labels = torch.full((2, 4, 4), ROAD)
        labels[0, :2] = CAR
        windows = labels[:, None].float().expand(-1, 3, -1, -1)
        pasted, now = paste_things(windows.repeat(50, 1, 1, 1), labels.repeat(50, 1, 1), things, share=1.0)
        assert torch.equal(pasted[:, 0].long(), now)
        assert 10 < (now[1::2, 0, 0] == CAR).sum() < 45  # 60 % of the crops without a car are given one
        assert (now[1::2, 2:] == ROAD).all()

    def test_cut_out_is_unknown(self) -> None:
        torch.manual_seed(0)
        windows, labels = cut_out(torch.ones(4, 3, 40, 40), torch.zeros(4, 40, 40, dtype=torch.int64), share=1.0)
        assert torch.equal(windows[:, 0] == 0, labels == IGNORE)
        assert 0 < (labels == IGNORE).float().mean() < 0.2

    def test_scenes_join_the_pictures(self, pairs: list[tuple[Path, Path]]) -> None:
        pictures = make_pictures(pairs, num_scenes=3)
        pictures._painting.join()
        assert pictures.num_painted == 3
        index, _ = pictures._choose(8, Augmentation(zoom=1, squeeze=1, turn=0, painted=0.5, pasted=0, blended=0))
        assert (index >= 4).sum() == 4
        assert pictures.images[4:].float().std() > 5
        assert pictures.labels.max() <= IGNORE

    def test_rare_classes_weigh_more(self, pairs: list[tuple[Path, Path]]) -> None:
        pictures = make_pictures(pairs)
        counts = np.bincount((IGNORE - pictures.labels).flatten().numpy(), minlength=IGNORE + 1)[:IGNORE]
        assert pictures.class_weights.mean() == pytest.approx(1)
        assert pictures.class_weights.argmax() == counts.argmin()

    def test_pictures_of_other_sizes_are_refused(self, pairs: list[tuple[Path, Path]]) -> None:
        for path in pairs[1]:
            Image.new("L", (20, 20)).save(path)
        with pytest.raises(ValueError, match=r"a_2.png: expected \(64, 96, 3\)"):
            make_pictures(pairs)


class TestHeldOut:
    def test_is_the_middle_of_each_sequence(self) -> None:
        pairs = [(Path(f"{sequence}_{i}.jpg"), Path("x")) for sequence in "ab" for i in range(5)]
        kept, held = hold_out(pairs, 1)
        assert [image.stem for image, _ in held] == ["a_2", "b_2"]
        assert sorted(kept + held) == pairs
        assert len(hold_out(pairs, 9)[1]) == 4
        assert hold_out(pairs, 0) == (pairs, [])

    def test_scores_as_official_inference_does(self, pairs: list[tuple[Path, Path]]) -> None:
        segmenter = load_segmenter(CHECKPOINT)
        row, _ = picture_row(segmenter, segmenter.merger, pairs[0], DATASETS["camvid"])
        expected = mean_iou(np.array(row["classes"]))
        held_out = HeldOut(pairs[:1], segmenter.inference, "cpu")
        assert held_out.score(Student(segmenter).eval()) == pytest.approx(expected, abs=2e-3)

    def test_none(self) -> None:
        inference = InferenceConfig(im_size=32, max_ratio=4, window_size=32, window_stride=32, normalization="vit")
        assert np.isnan(HeldOut([], inference, "cpu").score(torch.nn.Identity()))


class TestTraining:
    def test_student_computes_what_the_segmenter_does(self) -> None:
        segmenter = build_segmenter(CHECKPOINT).eval()
        windows = torch.randn(2, 3, 64, 96)
        torch.testing.assert_close(Student(segmenter).eval()(windows), segmenter(windows), atol=1e-4, rtol=1e-4)

    def test_a_tiny_run(self, tmp_path: Path, pairs: list[tuple[Path, Path]]) -> None:
        run(tmp_path, "--steps=2", "--init", str(CHECKPOINT))
        before, after = load_segmenter(CHECKPOINT), load_segmenter(tmp_path / "out/checkpoint.pth")
        change = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
        assert max(change) > 0
        assert all(torch.isfinite(parameter).all() for parameter in after.parameters())
        assert (tmp_path / "out/classes.csv").is_file()

    def test_minutes(self, tmp_path: Path, pairs: list[tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = itertools.count(0, 0.6)  # at every look, on however busy a machine
        monkeypatch.setattr("model_store.demo.train.time", SimpleNamespace(monotonic=lambda: next(seconds)))
        run(tmp_path, "--minutes=0.05", "--teacher-share=0")
        assert (tmp_path / "out/checkpoint.pth").is_file()

    def test_stopped_before_it_began(self, tmp_path: Path, pairs: list[tuple[Path, Path]]) -> None:
        stop = threading.Event()
        stop.set()
        run(tmp_path, "--steps=2", stop=stop)
        assert not (tmp_path / "out").exists()

    def test_a_gradient_that_overflowed_is_none(self) -> None:
        network = torch.nn.Linear(2, 1)
        before = network.weight.detach().clone()
        network.weight.grad, network.bias.grad = torch.tensor([[torch.nan, 1.0]]), torch.tensor([torch.inf])
        take_step(network, torch.optim.SGD(network.parameters(), lr=0.5))
        torch.testing.assert_close(before - network.weight.detach(), torch.tensor([[0.0, 0.5]]))

    def test_learning_rate(self) -> None:
        assert learning_rate(2.0, 10, 5, 0.0) == 1.0
        assert learning_rate(2.0, 10, 50, 0.5) == pytest.approx(1.0)
        assert learning_rate(2.0, 10, 99, 1.0) == 0.0


def run(folder: Path, *options: str, stop: threading.Event | None = None) -> None:
    small = ["--batch=3", "--teacher-batch=2", "--crop=64", "--scenes=0", "--held-out=1", "--warmup=1"]
    recipe = parse_recipe([f"--data={folder}", f"--out={folder / 'out'}", *small, *options])
    train(recipe, stop)
