"""Tests of inception.py."""

import copy
import math
import re
import urllib.error
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import inception
import runtime
from conftest import Tiny, draw, images_of, mistake, same

KEYS_OF_PYTORCH_FID = (566, 832996088)
FEATURES_OF_PYTORCH_FID = [0.0064534, 0, 0, 0.16878, 0.0066635, 0, 0.0031269, 0, 0.2505267]


def test_the_network_is_the_published_one(weights):
    listing = "".join(f"{key} {tuple(value.shape)}\n" for key, value in sorted(weights.items()))
    assert (len(weights), zlib.crc32(listing.encode())) == KEYS_OF_PYTORCH_FID
    image = images_of(1, 5, (40, 50))
    net = inception.build(weights)
    x = inception.inception_input(torch.from_numpy(image))
    with torch.no_grad():
        found = net(x)
        fused = inception.fuse_batchnorm(copy.deepcopy(net))(x)
    assert found.shape == (1, 2048)
    seen = torch.cat([found[0, 255::256], found[0, -256:].mean(0, keepdim=True)])
    assert torch.allclose(seen, torch.tensor(FEATURES_OF_PYTORCH_FID), rtol=1e-4, atol=1e-5)
    assert (found - fused).abs().max() <= 1e-5


def test_random_weights_are_the_same_everywhere_and_leave_the_random_state_alone(weights):
    before = torch.get_rng_state()
    assert same(inception.random_weights()["Conv2d_1a_3x3.conv.weight"], weights["Conv2d_1a_3x3.conv.weight"])
    assert torch.equal(before, torch.get_rng_state())
    first = weights["Conv2d_1a_3x3.conv.weight"].flatten()
    a = math.sqrt(6 / 27)
    assert torch.allclose(first[:3], torch.from_numpy(np.random.RandomState(0).uniform(-a, a, 3)).float())


@pytest.mark.parametrize("side", [7, 32, 299, 310])
def test_resizes_against_loops_and_pillow(side):
    images = torch.from_numpy(images_of(2, 1, (side, 11), smooth=False))
    x = images.double()
    tf1, clean, torchs = (inception.inception_input(images, name) for name in ("torch-fidelity", "clean-fid",
                                                                              "pytorch-fid"))
    random = np.random.RandomState(0)
    for _ in range(60):
        n, c, i, j = random.randint(2), random.randint(3), random.randint(299), random.randint(299)

        def bilinear(y, u, n=n, c=c):
            y, u = min(max(y, 0), side - 1), min(max(u, 0), 10)
            top, left = int(y), int(u)
            t, s, low, right = y - top, u - left, min(top + 1, side - 1), min(left + 1, 10)
            return ((1 - t) * (1 - s) * x[n, c, top, left] + (1 - t) * s * x[n, c, top, right]
                    + t * (1 - s) * x[n, c, low, left] + t * s * x[n, c, low, right])

        assert tf1[n, c, i, j] == pytest.approx(float((bilinear(i * side / 299, j * 11 / 299) - 128) / 128), abs=1e-4)
        half = bilinear((i + 0.5) * side / 299 - 0.5, (j + 0.5) * 11 / 299 - 0.5)
        assert torchs[n, c, i, j] == pytest.approx(float(half / 127.5 - 1), abs=1e-4)
    with_pillow = np.asarray(Image.fromarray(x[1, 2].float().numpy()).resize((299, 299), Image.Resampling.BICUBIC))
    assert np.abs((with_pillow.clip(0, 255) - 128) / 128 - clean[1, 2].numpy()).max() < 2e-3
    assert inception.inception_input(images[:, :1]).shape == (2, 3, 299, 299)
    with pytest.raises(ValueError, match="expected one of pytorch-fid"):
        inception.inception_input(images, "nearest")


def test_weights_are_found_checked_and_missed_with_one_sentence(here, weights, capsys, monkeypatch):
    torch.save(weights, "published.pth")
    extract = inception.load_features(weights="published.pth")
    assert "not the published ones" in extract.name
    grey = images_of(3, channels=1)
    extract.batch = 2
    a, b = extract(grey), inception.load_features("random")(np.repeat(grey, 3, 1))
    assert a.shape == (3, 2048) and extract.fc.shape == (1008, 2048) and torch.allclose(a, b, atol=1e-4)
    monkeypatch.setenv("TORCH_HOME", str(here / "home"))
    folder = here / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    cached = folder / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"")
    assert inception.find_weights() == cached
    cached.unlink()

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for path, words in (("", f"put it at {folder}"), ("nowhere.pth", "No such file"),
                        ("torchvision.pth", "size mismatch for fc.weight"), ("text.pth", "cannot be read")):
        torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, "torchvision.pth")
        Path("text.pth").write_text("words")
        with pytest.raises(runtime.UserError, match=re.escape(words)):
            inception.load_features(weights=path)
    draw(here / "images", 4)
    text = mistake(capsys, lambda: evaluate.main(["images", "images"]))
    assert "feature network random" in text and "--weights FILE" in text


def test_features_refuse_anything_but_uint8_images(tiny):
    extract = inception.load_features(tiny)
    for images in (np.zeros((2, 3, 8, 8)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            extract(images)
    with pytest.raises(runtime.UserError, match="expected inception, random, an exported .+test_inception.py': "):
        inception.load_features(__file__)
    with pytest.raises(runtime.UserError, match="'incepton': .*(not exist|no such file)"):
        inception.load_features("incepton")
    torch.export.save(torch.export.export(Tiny(), (torch.zeros(2, 3, 16, 16),)), "exported.pt2")
    images = images_of(2)
    assert torch.equal(inception.load_features("exported.pt2")(images), extract(images))
    with pytest.raises(runtime.UserError, match="exported.pt2 .*: given a batch of .3, 3, 16, 16., it fails: "):
        inception.load_features(Path("exported.pt2"))(images_of(3))   # it was exported for batches of two
    for answer in ("torch._assert(x.shape[2] == 224, 'only 224')", "return dict(x=x)", "return x[0, 0, 0, 0]"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.jit.CompilationUnit(f"def forward(x):\n    {answer}\n    {'return x' * ('_' in answer)}\n")
        with pytest.raises(runtime.UserError, match="own .*given a batch of .1, 3, 16, 16., it fails: "):
            inception.Features(net.forward, lambda x: x.float().expand(-1, 3, -1, -1), "cpu", "own net")(images_of(
                1, channels=1))
    assert extract.fc is None and extract.batch == 16 and "tiny.pt" in extract.name
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(extract.prepare(pixels), data.to_float(pixels).expand(1, 3, 16, 16))
