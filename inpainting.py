"""Filling holes: masks, context loss, Poisson solver, latent search, the enhancement stage."""

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


def completion_input(x, m):
    """What a completion network sees: the known pixels, mid-grey in the hole, and the mask itself in [-1, 1].

    x: (N, C, H, W) in [-1, 1]; m: (N, 1, H, W), 1 known and 0 hole -> (N, C + 1, H, W). No value of x inside the hole
    is let through, not even one that is not finite. Without the mask a grey hole would be a grey object.
    """
    return torch.cat([torch.where(m > 0.5, x, torch.zeros_like(x)), 2 * m.to(x.dtype).expand_as(x[:, :1]) - 1], 1)


def composite(x, y, m):
    """m x + (1 - m) y for m of 1 (known, from x) and 0 (hole, from y), selected: what is not taken may be anything."""
    return torch.where(m > 0.5, x, y)


def context_weights(known, window=7, base=0.2):
    """W_i = base + the share of hole in the window about i, if i is known, else 0: (N, 1, H, W) -> the same.

    Yeh et al. 2017, eq. 3, is base = 0: pixels count by how much hole lies near them. Deviation: with a 7x7 window that
    leaves a rim of 3 pixels and ignores the rest of the picture, so every known pixel counts at least `base`. window is
    odd; at the border of the picture it is cut off there.
    """
    share = 1 - F.avg_pool2d(known, window, 1, window // 2, count_include_pad=False)
    return known * (base + share)


def context_loss(x, y, W, gradient=0.5):
    """L = sum W |x - y| / sum W + gradient * sum V |d(x - y)| / sum V, means over channels: one loss a picture, (N,).

    The first term is Yeh et al. 2017, eq. 4. Deviation: divided by the sum of the weights, so that its weight against
    the prior means the same for every mask. The second compares differences d of neighbouring pixels, along both axes,
    where both are known (Vitoria et al. 2018, section 3.1); V is the smaller W of the two. x, y: (N, C, H, W). Where W
    is 0 neither x nor y is read.
    """
    d = torch.where(W > 0, x.float() - y, 0.0)

    def mean(d, W):
        return (W * d.abs()).sum((1, 2, 3)) / (d.shape[1] * W.sum((1, 2, 3))).clamp_min(1e-12)

    V = torch.minimum(W[..., 1:, :], W[..., :-1, :]), torch.minimum(W[..., 1:], W[..., :-1])
    slopes = d[..., 1:, :] - d[..., :-1, :], d[..., 1:] - d[..., :-1]
    total = [(v * e.abs()).sum((1, 2, 3)) for v, e in zip(V, slopes)]
    weight = d.shape[1] * (V[0].sum((1, 2, 3)) + V[1].sum((1, 2, 3))).clamp_min(1e-12)
    return mean(d, W) + gradient * (total[0] + total[1]) / weight


def neighbours(x):
    """The sum of the four neighbours of each pixel, of those that lie in the picture."""
    total = torch.zeros_like(x)
    total[..., 1:, :] += x[..., :-1, :]
    total[..., :-1, :] += x[..., 1:, :]
    total[..., 1:] += x[..., :-1]
    total[..., :-1] += x[..., 1:]
    return total


@torch.no_grad()
def harmonic_fill(x, known, tol=1e-6):
    """u = x where known; in the hole Laplace's equation: each pixel is the mean of its neighbours. (N, C, H, W).

    deg(i) u_i - sum_{j ~ i, j in hole} u_j = sum_{j ~ i, j known} x_j   for i in the hole, j ~ i its neighbours inside
    the picture and deg(i) their number, so that a hole at the border may meet it at any value (Neumann condition).
    Solved by conjugate gradients with the mask inside the operator, all pictures at once and each for itself: one that
    has converged (residual under tol times the right-hand side) rests, so that the others of its batch change nothing.
    The first guess is the solution at half the size. A picture without any known pixel comes out 0.
    """
    hole = (known < 0.5).to(x.dtype)
    x = torch.where(hole > 0, 0.0, x)
    deg = neighbours(torch.ones_like(hole))

    def dot(a, b):
        return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)

    def A(p):
        return hole * (deg * p - neighbours(p))              # p is 0 where known

    b = hole * neighbours(x)
    u = torch.zeros_like(x)
    if min(x.shape[2:]) > 8:
        share = F.avg_pool2d(1 - hole, 2, ceil_mode=True)
        half = harmonic_fill(F.avg_pool2d(x, 2, ceil_mode=True) / share.clamp_min(1e-3), (share > 0).to(x.dtype), tol)
        u = hole * F.interpolate(half, size=x.shape[2:], mode="bilinear")
    r = b - A(u)
    p, square, goal = r, dot(r, r), tol**2 * dot(b, b)
    for k in range(20 * sum(x.shape[2:])):
        busy = square > goal
        if k % 8 == 0 and not busy.any():                    # on a GPU each look waits for it
            break
        Ap = A(p)
        alpha = torch.where(busy, square / dot(p, Ap).clamp_min(1e-30), 0.0)
        u = u + alpha * p
        r = r - alpha * Ap
        new = dot(r, r)
        p = torch.where(busy, r + new / square.clamp_min(1e-30) * p, p)
        square = new
    return x + hole * u


def poisson_blend(target, guidance, known, tol=1e-6):
    """u = target where known; in the hole the gradients of `guidance` that meet the target at the rim. (N, C, H, W).

    deg(i) u_i - sum_{j ~ i, j in hole} u_j = sum_{j ~ i, j known} target_j + sum_{j ~ i} (g_i - g_j)   for i in the
    hole. Perez et al. 2003, eq. 7. u - g is harmonic there and target - g at the rim, so that is what is solved for.
    Not clamped to [-1, 1]. A picture without any known pixel is the guidance.
    """
    return torch.where(known < 0.5, guidance + harmonic_fill(target - guidance, known, tol), target)


class Enhancer(nn.Module):
    """The second stage of Chandak et al. 2019: x (N, C, H, W) completed, known (N, 1, H, W) -> x + a correction.

    `depth` convolutions 3x3 with ReLU between; the last begins at 0, so that an untrained one is the identity. The
    layers are ours: the paper's are not public. What it does to known pixels is for the caller to take back.
    """

    def __init__(self, channels=3, features=64, depth=5):
        super().__init__()
        self.config = dict(channels=channels, features=features, depth=depth)
        widths = [channels + 1] + [features] * (depth - 1)
        hidden = [layer for c_in, c_out in zip(widths, widths[1:])
                  for layer in (nn.Conv2d(c_in, c_out, 3, 1, 1), nn.ReLU())]
        self.correction = nn.Sequential(*hidden, nn.Conv2d(features, channels, 3, 1, 1))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, x, known):
        return x + self.correction(torch.cat([x, known.to(x.dtype)], 1)).float()


def enhancement_loss(x, real, known, ring=4):
    """L = the mean of |x - real| over the hole and `ring` pixels about it, of all pictures together. Scalar."""
    area = F.max_pool2d(1 - known, 2 * ring + 1, 1, ring)                              # (N, 1, H, W)
    return (area * (x.float() - real).abs()).sum() / (x.shape[1] * area.sum()).clamp_min(1e-12)


def masks(kind, n, size, seed=0):
    """n masks for completion -> float32 (n, 1, H, W), 1 where the picture is known and 0 in the hole.

    kind: "center", a square hole of half of each side; "half", one of the four halves; "box", a rectangle of 1/4 to 5/8
    of each side anywhere; "random", 80 % of the pixels; "strokes", free-form strokes over 10 to 40 % (in the manner of
    Yu et al. 2019, arXiv 1806.03589, algorithm 1); or the name of a picture, black in the hole. size: (height, width).
    Mask k is a function of (kind, size, seed, k), whatever n.
    """
    height, width = size
    out = np.ones((n, 1, height, width), np.float32)
    if kind not in ("center", "half", "box", "random", "strokes"):
        if not Path(kind).is_file():
            raise ValueError(f"--mask {kind}: take center, half, box, random, strokes, or the file of a picture, black "
                             f"in the hole (there is no file {kind})")
        try:
            im = decode.upright(decode.open_image(sources.read_bytes(kind))).convert("L")
        except Exception as error:                           # Pillow's, of almost any kind
            raise ValueError(f"--mask {kind} is no picture that can be read ({type(error).__name__})") from error
        known = np.asarray(im.resize((width, height), Image.Resampling.NEAREST)) >= 128
        out[:] = known
        return torch.from_numpy(out)
    for k in range(n):
        random = np.random.RandomState([seed, k])
        hole = np.zeros((height, width), bool)
        if kind == "center":
            hole[height // 4:height // 4 + height // 2, width // 4:width // 4 + width // 2] = True
        elif kind == "half":
            halves = (hole[:height // 2], hole[height - height // 2:], hole[:, :width // 2],
                      hole[:, width - width // 2:])
            halves[random.randint(4)][:] = True
        elif kind == "box":
            h, w = (random.randint(-(-side // 4), side * 5 // 8 + 1) for side in size)
            top, left = random.randint(height - h + 1), random.randint(width - w + 1)
            hole[top:top + h, left:left + w] = True
        elif kind == "random":
            hole.reshape(-1)[random.permutation(height * width)[:round(0.8 * height * width)]] = True
        else:
            hole = strokes(height, width, random)
        out[k, 0] = ~hole
    return torch.from_numpy(out)


def strokes(height, width, random):
    """One mask of free-form strokes, True in the hole: strokes are added until they cover over 10 to 30 % at random."""
    side, goal = min(height, width), random.uniform(0.1, 0.3)
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    while np.asarray(canvas).mean() < goal:
        x, y, angle = random.uniform(0, width), random.uniform(0, height), random.uniform(0, 2 * math.pi)
        brush = random.uniform(0.04, 0.1) * side
        for _ in range(random.randint(1, 5)):
            angle += random.uniform(-1.2, 1.2)
            length = random.uniform(0.08, 0.25) * side
            u, v = x + length * math.cos(angle), y + length * math.sin(angle)
            draw.line((x, y, u, v), 1, max(1, round(brush)))
            draw.ellipse((u - brush / 2, v - brush / 2, u + brush / 2, v + brush / 2), 1)
            x, y = u, v
    return np.asarray(canvas)


POOL, KEPT = 1024, 4                                        # latents the search begins with; restarts it ends with


def on_sphere(z):
    """z at the radius sqrt(d) that a Gaussian in d dimensions has (Menon et al. 2020, arXiv 2003.03808)."""
    return F.normalize(z, dim=-1) * z.shape[-1] ** 0.5


class Search:
    """Yeh et al. 2017: z^ = argmin over z of context(G(z), y) + prior * (mean - D(G(z))) / std; contents G(z^).

    mean and std are those of D over pictures of G, so that `prior` means the same for every critic. Deviations: z stays
    on the sphere where G's latents lie instead of in a box; the restarts begin with the best of `POOL` latents; Adam's
    learning rate falls as a cosine. The answers are in the order of their context loss, the only thing known of them.
    """

    def __init__(self, G, D, restarts=16, iterations=100, prior=0.003, lr=0.1, seed=0, amp=None):
        self.G, self.D, self.restarts, self.iterations, self.prior, self.lr = G, D, restarts, iterations, prior, lr
        self.amp, self.device = amp or contextlib.nullcontext(), next(G.parameters()).device
        random = torch.Generator().manual_seed(seed)         # the same starts for every picture, alone or in a batch
        h, w = G.config["size"]
        self.at_once = max(1, 2**20 // (h * w))              # pictures of G that fit into memory with their graph
        pool = min(POOL, 32 * self.at_once)
        self.pool = on_sphere(torch.randn(pool, G.config["latent"], generator=random)).to(self.device)
        with torch.no_grad():
            self.drawn = torch.cat([G(z) for z in self.pool.split(64)])
            scores = torch.cat([D(x) for x in self.drawn.split(64)])
        self.mean, self.std = scores.mean(), scores.std().clamp_min(1e-6)

    def __call__(self, y, known):
        """y (N, C, h, w), known (N, 1, h, w) -> contents (N, A, C, h, w), A = min(KEPT, restarts)."""
        few = max(1, self.at_once // self.restarts)
        if len(y) > few:
            return torch.cat([self(*part) for part in zip(y.split(few), known.split(few))])
        W = context_weights(known)
        with torch.no_grad():                                # each picture by itself: 1024 x N would be a lot of memory
            far = torch.stack([torch.cat([context_loss(x, one, w) for x in self.drawn.split(128)])
                               for one, w in zip(y.unsqueeze(1), W.unsqueeze(1))])    # (N, POOL)
        z = self.pool[best_first(far, self.restarts)]        # (N, K, d)
        pause = self.iterations // 5
        z, context, _ = self.refine(z, y, W, range(pause))
        z = z[torch.arange(len(y))[:, None], best_first(context, KEPT)]
        _, context, x = self.refine(z, y, W, range(pause, self.iterations))
        return x[torch.arange(len(y))[:, None], best_first(context, KEPT)]

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
            loss = context_loss(x, y, W) - self.prior * realism                   # (N K,)
            opt.zero_grad()
            loss.sum().backward()
            opt.step()
            with torch.no_grad():
                z.copy_(on_sphere(z))
        with torch.no_grad():
            x = self.G(z)
            context = context_loss(x, y, W)
        return z.detach().view(n, k, -1), context.view(n, k), x.view(n, k, *x.shape[1:])


def best_first(losses, most):
    """Indices (N, K) of the `most` smallest of each row of (N, M), the smallest first; K = M where that is fewer."""
    return losses.argsort(dim=1, stable=True)[:, :most]


class Forward:
    """One pass of a network trained by train_pix2pix.py --task complete; it has one answer."""

    def __init__(self, U):
        self.U = U

    @torch.no_grad()
    def __call__(self, y, known):
        return self.U(completion_input(y, known)).unsqueeze(1)


def blend_into_hole(contents, y, known, blend="poisson"):
    """Contents (N, A, C, h, w) put into the holes of y (N, C, h, w): the same shape, equal to y where that is known."""
    n, a = contents.shape[:2]
    y, known = y.repeat_interleave(a, 0), known.repeat_interleave(a, 0)
    x = contents.flatten(0, 1)
    x = poisson_blend(y, x, known).clamp(-1, 1) if blend == "poisson" else composite(y, x, known)
    return x.view(n, a, *x.shape[1:])


@torch.no_grad()
def enhance(enhancer, x, known):
    """`enhancer` on completed x (N, A, C, h, w), the known pixels as they were."""
    n, a = x.shape[:2]
    x, known = x.flatten(0, 1), known.repeat_interleave(a, 0)
    return composite(x, enhancer(x, known).clamp(-1, 1), known).view(n, a, *x.shape[1:])


def complete_batch(method, y, known, blend, enhancer=None):
    """All stages: (N, A, C, h, w) in [-1, 1]."""
    y = composite(y, torch.zeros_like(y), known)         # from here on there is nothing in the hole to be read
    x = blend_into_hole(method(y, known), y, known, blend)
    return enhance(enhancer, x, known) if enhancer else x


def train_enhancer(x, real, known, steps=400, batch=16, seed=0, lr=1e-3, bf16=False):
    """Stage 2 of Chandak et al. 2019: an `Enhancer` from completed x to `real`, both (N, C, h, w); mirrored at random.

    L1 in the hole and a ring about it; Adam with cosine decay.
    """
    torch.manual_seed(seed)
    net = Enhancer(x.shape[1]).to(x.device, memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr, (0.9, 0.999))
    amp = torch.autocast(x.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    for k in (step.start for step in runtime.batched_slices(steps, 1, "steps")):
        opt.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * k / steps))
        index = torch.randint(len(x), (batch,)).to(x.device)
        x_now, real_now, known_now = (t[index].flip(3) if k % 2 else t[index] for t in (x, real, known))
        with amp:
            loss = enhancement_loss(net(x_now, known_now), real_now, known_now)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.eval().requires_grad_(False)
