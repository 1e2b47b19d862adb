"""Filling holes: masks, the context loss, a Poisson solver, the search in latent space, the enhancement stage.

Everywhere: x, y (N, C, H, W) in [-1, 1]; known (N, 1, H, W), 1 where a pixel is known and 0 in the hole. What an image
has inside the hole is never read.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import decode
import runtime
import sources

MASK_KINDS = ("center", "half", "box", "random", "strokes")
POOL, KEPT = 1024, 4                    # LatentSearch: latents that are scored at first; restarts refined to the end


def masks(kind, n, size, seed=0):
    """n masks for completion -> float32 (n, 1, H, W), 1 where the image is known and 0 in the hole.

    kind: "center", a hole of half of each side; "half", one of the four halves; "box", a rectangle of 1/4 to 5/8
    of each side anywhere; "random", 80 % of the pixels; "strokes", see `draw_strokes`; an image file, black in the
    hole, or a folder of such, taken in turn. Mask k is a function of (kind, size, seed, k) alone, whatever n.
    """
    if kind not in MASK_KINDS:
        files = [Path(kind, name) for name in sources.find_images(kind)] or [kind]
        known = torch.cat([read_mask(file, size) for file in files[:n]])
        return known[torch.arange(n) % len(known)]
    height, width = size
    holes = np.zeros((n, 1, height, width), bool)
    for k in range(n):
        random, hole = np.random.RandomState([seed, k]), holes[k, 0]
        if kind == "center":
            hole[height // 4:height // 4 + height // 2, width // 4:width // 4 + width // 2] = True
        elif kind == "half":
            h, w = height // 2, width // 2
            (hole[:h], hole[height - h:], hole[:, :w], hole[:, width - w:])[random.randint(4)][:] = True
        elif kind == "box":
            h, w = (random.randint(-(-side // 4), side * 5 // 8 + 1) for side in size)
            top, left = random.randint(height - h + 1), random.randint(width - w + 1)
            hole[top:top + h, left:left + w] = True
        elif kind == "random":
            hole.reshape(-1)[random.permutation(height * width)[:round(0.8 * height * width)]] = True
        else:
            hole[:] = draw_strokes(height, width, random)
    return torch.from_numpy(~holes).float()


def read_mask(path, size):
    """An image file -> one of `masks`. Raises runtime.UserError if it is no image, or there is no hole or only hole."""
    try:
        im = decode.upright(decode.open_image(Path(path).read_bytes())).convert("L")
    except Exception as error:                               # Pillow raises almost anything for a damaged file
        raise runtime.UserError(f"--mask {path}: expected {', '.join(MASK_KINDS)}, an image, black in the hole, or a "
                                f"folder of such; reading it failed ({type(error).__name__})") from error
    if np.mean(np.abs(np.asarray(im) - 127.5) < 96) > 0.2:
        raise runtime.UserError(f"--mask {path}: expected black, the hole, and white; a fifth and more of it is grey")
    known = np.asarray(im.resize(size[::-1], Image.Resampling.NEAREST)) >= 128
    if known.all() or not known.any():
        raise runtime.UserError(f"--mask {path}: no hole or only hole at {size[0]}x{size[1]}; black is the hole")
    return torch.from_numpy(known[None, None]).float()


def draw_strokes(height, width, random):
    """Free-form strokes -> bool (H, W), True in the hole, after Yu et al. 2019 (arXiv 1806.03589). Deviation: turns and
    sizes are ours; strokes are added until they cover over U(10 %, 30 %) of the image, the last one up to 45 %."""
    side, goal = min(height, width), random.uniform(0.1, 0.3)
    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < goal:
        x, y, angle = random.uniform(0, width), random.uniform(0, height), random.uniform(0, 2 * math.pi)
        brush = random.uniform(0.04, 0.1) * side
        for _ in range(random.randint(1, 5)):
            angle += random.uniform(-1.2, 1.2)
            length = random.uniform(0.08, 0.25) * side
            u, v = x + length * math.cos(angle), y + length * math.sin(angle)
            pen.line((x, y, u, v), 1, max(1, round(brush)))
            pen.ellipse((u - brush / 2, v - brush / 2, u + brush / 2, v + brush / 2), 1)
            x, y = u, v
    return np.asarray(canvas)


def completion_input(x, known):
    """Input of a completion network (N, C + 1, H, W): the known pixels, mid-grey in the hole, and the mask in [-1, 1],
    without which a grey hole could not be told from a grey object."""
    return torch.cat([composite(x, 0.0, known), 2 * known.to(x.dtype).expand_as(x[:, :1]) - 1], 1)


def composite(x, y, known):
    """known * x + (1 - known) * y, by selection: values that are not taken may be anything, NaN too."""
    return torch.where(known > 0.5, x, y)


def mean_fill(y, known):
    """The hole filled with the mean of the known pixels of each image and channel."""
    total = composite(y, 0.0, known).sum((2, 3), keepdim=True)
    return composite(y, total / known.sum((2, 3), keepdim=True).clamp(min=1), known)


def neighbour_sum(x):
    """The sum of the up to four neighbours of each pixel."""
    x = F.pad(x, (1, 1, 1, 1))
    return x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]


def harmonic_fill(x, known, tol=1e-6):
    """u = x where known; in the hole Laplace's equation: each pixel is the mean of its neighbours. (N, C, H, W).

        deg(i) u_i - sum_{j ~ i, j in hole} u_j = sum_{j ~ i, j known} x_j    for i in the hole,

    j ~ i the neighbours of i inside the image, deg(i) their number (at its border the Neumann condition). Conjugate
    gradients on all images at once, from the solution at half the size. An image that has converged (residual under tol
    times the right-hand side) is frozen: the rest of the batch changes nothing. Without known pixels it becomes 0.
    """
    hole = (known < 0.5).to(x.dtype)
    x = torch.where(hole > 0, 0.0, x)
    deg = neighbour_sum(torch.ones_like(hole))

    def dot(a, b):
        return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)

    def A(p):
        return hole * (deg * p - neighbour_sum(p))           # p is 0 where known

    b = hole * neighbour_sum(x)
    u = torch.zeros_like(x)
    if min(x.shape[2:]) > 8:
        share = F.avg_pool2d(1 - hole, 2, ceil_mode=True)
        half = harmonic_fill(F.avg_pool2d(x, 2, ceil_mode=True) / share.clamp_min(1e-3), (share > 0).to(x.dtype), tol)
        u = hole * F.interpolate(half, size=x.shape[2:], mode="bilinear")
    r = b - A(u)
    p, square, goal = r, dot(r, r), tol**2 * dot(b, b)
    for k in range(20 * sum(x.shape[2:])):
        active = square > goal
        if k % 8 == 0 and not active.any():                  # a GPU is synchronised only every eighth iteration
            break
        Ap = A(p)
        alpha = torch.where(active, square / dot(p, Ap).clamp_min(1e-30), 0.0)
        u = u + alpha * p
        r = r - alpha * Ap
        square, before = dot(r, r), square
        p = torch.where(active, r + square / before.clamp_min(1e-30) * p, p)
    return x + hole * u


def poisson_blend(target, guidance, known, tol=1e-6):
    """u = target where known; in the hole the gradients of `guidance`, continuing the target. (N, C, H, W).

        deg(i) u_i - sum_{j ~ i, j in hole} u_j = sum_{j ~ i, j known} target_j + sum_{j ~ i} (g_i - g_j)

    for i in the hole. Perez et al. 2003, eq. 7. u - g is harmonic in the hole and equals target - g at its boundary, so
    `harmonic_fill` solves it. Not clamped to [-1, 1].
    """
    return torch.where(known < 0.5, guidance + harmonic_fill(target - guidance, known, tol), target)


def context_weights(known, window=7, base=0.2):
    """W_i = base + share of hole in the window about i, if i is known, else 0: (N, 1, H, W) -> (N, 1, H, W).

    Yeh et al. 2017, eq. 3, has base = 0. Deviation: with a 7x7 window that leaves a rim of 3 pixels and ignores the
    rest of the image, so every known pixel counts at least `base`. window: odd, clipped at the border of the image.
    """
    share = 1 - F.avg_pool2d(known, window, 1, window // 2, count_include_pad=False)
    return known * (base + share)


def context_loss(x, y, W, gradient=0.5):
    """L = sum W |x - y| / sum W + gradient * sum V |d(x - y)| / sum V, means over channels: one loss per image, (N,).

    The first term is Yeh et al. 2017, eq. 4. Deviation: divided by the sum of the weights, so that its weight against
    the prior means the same for every mask. The second compares differences d of neighbouring pixels, along both axes,
    where both are known (Vitoria et al. 2018, section 3.1); V is the smaller W of the two. x, y: (N, C, H, W). Where W
    is 0 neither x nor y is read.
    """
    d = torch.where(W > 0, x.float() - y, 0.0)
    V = torch.minimum(W[..., 1:, :], W[..., :-1, :]), torch.minimum(W[..., 1:], W[..., :-1])
    differences = d[..., 1:, :] - d[..., :-1, :], d[..., 1:] - d[..., :-1]
    total = [(v * e.abs()).sum((1, 2, 3)) for v, e in zip(V, differences)]
    weight = d.shape[1] * (V[0].sum((1, 2, 3)) + V[1].sum((1, 2, 3))).clamp_min(1e-12)
    first = (W * d.abs()).sum((1, 2, 3)) / (d.shape[1] * W.sum((1, 2, 3))).clamp_min(1e-12)
    return first + gradient * (total[0] + total[1]) / weight


def project_to_sphere(z):
    """z scaled to length sqrt(d), where a Gaussian in d dimensions lies (Menon et al. 2020, arXiv 2003.03808)."""
    return F.normalize(z, dim=-1) * z.shape[-1] ** 0.5


class LatentSearch:
    """Yeh et al. 2017: z^ = argmin over z of context(G(z), y) + prior * (mean - D(G(z))) / std; the answer is G(z^).

    Deviations: the paper's prior is lambda log(1 - D(G(z))); here D is standardised by its mean and std over samples of
    G, so that `prior` means the same for every critic. z stays on the sphere where G's latents lie, not in a box; the
    restarts begin with the best of `POOL` latents; all but the best `KEPT` end after a fifth of the iterations; Adam's
    learning rate decays as a cosine. G and D are in eval mode and frozen.
    """

    def __init__(self, G, D, restarts=16, iterations=100, prior=0.003, lr=0.1, seed=0, bf16=False):
        self.G, self.D, self.restarts, self.iterations, self.prior, self.lr = G, D, restarts, iterations, prior, lr
        device = next(G.parameters()).device
        self.amp = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        self.chunk = max(1, 2**20 // math.prod(G.config["size"]))            # samples of G at a time, with their graph
        random = torch.Generator().manual_seed(seed)         # the same starts for every image, alone or in a batch
        pool = torch.randn(min(POOL, 32 * self.chunk), G.config["latent"], generator=random)
        self.pool = project_to_sphere(pool).to(device)
        self.samples = torch.cat([G(z) for z in self.pool.split(64)])
        scores = torch.cat([D(x) for x in self.samples.split(64)])
        self.mean, self.std = scores.mean(), scores.std().clamp_min(1e-6)

    def __call__(self, y, known):
        """y (N, C, h, w), known (N, 1, h, w) -> contents (N, A, C, h, w), A = min(KEPT, restarts), by context loss."""
        n = max(1, self.chunk // self.restarts)
        if len(y) > n:
            return torch.cat([self(*part) for part in zip(y.split(n), known.split(n))])
        W, rows = context_weights(known), torch.arange(len(y))[:, None]
        context = torch.stack([torch.cat([context_loss(x, one, w) for x in self.samples.split(128)])
                               for one, w in zip(y.unsqueeze(1), W.unsqueeze(1))])    # (N, POOL), image by image
        best, fifth = context.argsort(stable=True)[:, :self.restarts], self.iterations // 5
        z, context, _ = self.refine(self.pool[best], y, W, range(fifth))
        best = context.argsort(stable=True)[:, :KEPT]
        _, context, x = self.refine(z[rows, best], y, W, range(fifth, self.iterations))
        return x[rows, context.argsort(stable=True)]

    def refine(self, z, y, W, steps):
        """z (N, K, d) after `steps`, a range out of 0..iterations; its context loss (N, K); G(z) (N, K, C, h, w)."""
        n, k = z.shape[:2]
        y, W = y.repeat_interleave(k, 0), W.repeat_interleave(k, 0)
        z = z.flatten(0, 1).clone().requires_grad_(True)                              # (N K, d)
        opt = torch.optim.Adam([z], self.lr, (0.9, 0.999))
        for i in steps:
            opt.param_groups[0]["lr"] = self.lr * (0.55 + 0.45 * math.cos(math.pi * i / self.iterations))
            with self.amp:
                x = self.G(z)
                realism = (self.D(x) - self.mean) / self.std if self.prior else 0.0
            loss = context_loss(x, y, W) - self.prior * realism                       # (N K,)
            opt.zero_grad()
            loss.sum().backward()
            opt.step()
            with torch.no_grad():
                z.copy_(project_to_sphere(z))
        z = z.detach()
        x = self.G(z)
        return z.view(n, k, -1), context_loss(x, y, W).view(n, k), x.view(n, k, *x.shape[1:])


class Enhancer(nn.Module):
    """The second stage of Chandak et al. 2019: completed x (N, C, H, W), known (N, 1, H, W) -> x + a correction.

    `depth` 3x3 convolutions with LeakyReLU(0.2) between, as units of ReLU die here; the last is initialised to 0, so
    that an untrained network is the identity. Deviation: the layers are ours, the paper's are not public.
    """

    def __init__(self, channels=3, features=64, depth=5):
        super().__init__()
        hidden = [layer for c_in in [channels + 1] + [features] * (depth - 2)
                  for layer in (nn.Conv2d(c_in, features, 3, 1, 1), nn.LeakyReLU(0.2))]
        self.correction = nn.Sequential(*hidden, nn.Conv2d(features, channels, 3, 1, 1))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, x, known):
        return x + self.correction(torch.cat([x, known.to(x.dtype)], 1)).float()


def enhancement_loss(x, real, known, ring=4):
    """L = mean of |x - real| over the hole and a ring of `ring` pixels about it, over the whole batch. Scalar."""
    area = F.max_pool2d(1 - known, 2 * ring + 1, 1, ring)                              # (N, 1, H, W)
    return (area * (x.float() - real).abs()).sum() / (x.shape[1] * area.sum()).clamp_min(1e-12)


def train_enhancer(x, real, known, steps=400, batch=16, seed=0, lr=1e-3, bf16=False):
    """An `Enhancer` trained from completed x to `real`, both (N, C, h, w), every second step mirrored. Adam, cosine."""
    torch.manual_seed(seed)
    net = Enhancer(x.shape[1]).to(x.device, memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr, (0.9, 0.999))
    for k, _ in enumerate(runtime.batched_slices(steps, 1, "enhancement steps")):
        opt.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * k / steps))
        index = torch.randint(len(x), (batch,)).to(x.device)
        inputs, target, mask = (t[index].flip(3) if k % 2 else t[index] for t in (x, real, known))
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = enhancement_loss(net(inputs, mask), target, mask)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.eval().requires_grad_(False)


def blend_into_hole(content, y, known, blend="poisson"):
    """`content` put into the holes of y, by `poisson_blend` or, for any other `blend`, pasted. (N, C, H, W)."""
    return poisson_blend(y, content, known).clamp(-1, 1) if blend == "poisson" else composite(y, content, known)


def complete_batch(method, y, known, blend, enhancer=None):
    """All stages -> completed images (N, A, C, H, W): A answers of `method` for each of y, equal to y where known."""
    y = composite(y, 0.0, known)                             # from here on there is nothing in the hole to be read
    contents = method(y, known)
    y, known = (t.repeat_interleave(contents.shape[1], 0) for t in (y, known))
    x = blend_into_hole(contents.flatten(0, 1), y, known, blend)
    if enhancer:
        x = composite(x, enhancer(x, known).clamp(-1, 1), known)
    return x.view(contents.shape)
