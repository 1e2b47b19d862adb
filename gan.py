"""Everything that has an equation: networks, losses, penalties, augmentation, averaging. Needs torch and nothing else.

Paste this file into a notebook cell, or `import gan`. Two conventions hold everywhere:

* a loss is a pure function of outputs and returns what is **minimised**; D is high on real, low on fake;
* real comes before fake: `f_real = D(real)`, `f_fake = D(fake)`.

Images are float tensors (N, C, H, W) in [-1, 1]; latents are (N, latent) ~ N(0, 1); D returns one raw score an image,
(N,), PatchGAN's one a patch, (N, h, w). Masks are (N, 1, H, W): 1 where an image is known, 0 in the hole.

    Goodfellow et al. 2014 Generative adversarial nets                                          arXiv 1406.2661
    Radford et al. 2015    Unsupervised representation learning with deep convolutional GANs    arXiv 1511.06434
    Salimans et al. 2016   Improved techniques for training GANs                                arXiv 1606.03498
    Arjovsky et al. 2017   Wasserstein GAN                                                      arXiv 1701.07875
    Gulrajani et al. 2017  Improved training of Wasserstein GANs                                arXiv 1704.00028
    Isola et al. 2017      Image-to-image translation with conditional adversarial networks     arXiv 1611.07004
    Petzka et al. 2018     On the regularization of Wasserstein GANs                            arXiv 1709.08894
    Miyato et al. 2018     Spectral normalization for generative adversarial networks           arXiv 1802.05957
    Mescheder et al. 2018  Which training methods for GANs do actually converge?                arXiv 1801.04406
    Zhao et al. 2020       Differentiable augmentation for data-efficient GAN training          arXiv 2006.10738
    Huang et al. 2024      The GAN is dead; long live the GAN! A modern baseline GAN            arXiv 2501.05441
"""

import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

MIN_SIDE, MAX_SIDE = 8, 1024                                # what the grids below are built and tested for


# ---- Networks

def grid_sizes(size):
    """The grids an image of `size` = (height, width) grows through, smallest first.

    Level k from the image is ceil(size / 2^k), k = 0 .. n, n the smallest number for which the shorter side of the base
    grid is at most 7 (it is then at least 4).

        grid_sizes((64, 64))   = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
        grid_sizes((287, 508)) = [(5, 8), (9, 16), (18, 32), (36, 64), (72, 127), (144, 254), (287, 508)]

    Raises ValueError for a side outside 8..1024, and names the nearest size that works.
    """
    height, width = size = (size, size) if isinstance(size, int) else size
    if not (MIN_SIDE <= min(size) and max(size) <= MAX_SIDE):
        near = "x".join(str(min(max(side, MIN_SIDE), MAX_SIDE)) for side in size)
        raise ValueError(f"size {height}x{width} is out of range: both sides must lie between {MIN_SIDE} and {MAX_SIDE}"
                         f"; the nearest size that works is {near}")
    n = next(n for n in range(9) if -(-min(size) // 2**n) <= 7)
    return [(-(-height // 2**k), -(-width // 2**k)) for k in range(n, -1, -1)]


def channel_widths(depth, features, max_features):
    """Channels of the `depth` hidden levels counted from the image: features * 2^k, at most max_features."""
    if min(features, max_features) < 1:
        raise ValueError("features and max_features must be at least 1")
    return [min(features * 2**k, max_features) for k in range(depth)]


def init_weights(module):
    """Radford et al. 2015, section 4: weights ~ N(0, 0.02). BatchNorm gains ~ N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)           # around 1, not 0: a gain of 0 would silence the layer
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def upsample_layer(c_in, c_out, upsample, bias=False):
    """Doubles height and width: (N, c_in, h, w) -> (N, c_out, 2h, 2w)."""
    if upsample == "transposed":
        return nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=bias)
    if upsample != "nearest":
        raise ValueError(f"upsample is 'transposed' or 'nearest', not {upsample!r}")
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=bias))


class Generator(nn.Module):
    """DCGAN's generator (Radford et al. 2015, figure 1) for any height and width: z (N, latent) -> (N, channels, H, W).

    Project z to the base grid of `grid_sizes(size)`, then double the grid at each level; every level is cropped to its
    place in the grid_sizes, so that the last is exactly `size` and no level works on rows that nobody will see.
    BatchNorm and ReLU follow every level but the last, which ends in tanh. Deviations: z is normal, not uniform; the
    kernels are 4x4, as in most ports, not 5x5; half the channels (the paper's: features 128, max_features 1024).

    upsample: "transposed" (the paper's) or "nearest" (nearest neighbour, then a 3x3 convolution: no checkerboards).
    Raises ValueError for a size, a width or an `upsample` that cannot be built.
    """

    def __init__(self, size, channels=3, latent=128, features=64, max_features=512, upsample="transposed"):
        super().__init__()
        self.grids = grid_sizes(size)
        self.config = dict(size=self.grids[-1], channels=channels, latent=latent, features=features,
                           max_features=max_features, upsample=upsample)     # load_generator() builds it from this
        widths = channel_widths(len(self.grids) - 1, features, max_features)[::-1]
        (h, w), c = self.grids[0], widths[0]
        self.project = nn.Linear(latent, h * w * c, bias=False)
        self.norm = nn.BatchNorm2d(c)
        self.levels = nn.ModuleList(
            nn.Sequential(upsample_layer(c_in, c_out, upsample), nn.BatchNorm2d(c_out), nn.ReLU())
            for c_in, c_out in zip(widths, widths[1:]))
        self.to_image = upsample_layer(widths[-1], channels, upsample, bias=True)
        self.apply(init_weights)

    def forward(self, z):
        h, w = self.grids[0]
        x = self.project(z.flatten(1)).view(len(z), h, w, -1).permute(0, 3, 1, 2)     # (N, c, h, w), channels last
        x = F.relu(self.norm(x))
        for level, (h, w) in zip([*self.levels, self.to_image], self.grids[1:]):
            x = level(x)[..., :h, :w]                                                 # (N, c/2, 2h, 2w), cropped
        return torch.tanh(x.float())                                                  # (N, channels, H, W)


def norm_layer(kind, channels):
    """A layer that normalises (N, channels, h, w), or None for "none" and "spectral" (a property of the weights)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "layer":
        return nn.GroupNorm(1, channels)                    # over (C, H, W) of one sample; gain and bias per channel
    if kind not in ("none", "spectral"):
        raise ValueError(f"norm is none, batch, instance, layer or spectral, not {kind!r}")
    return None


def downsample_layers(c_in, c_out, norm, stride=2):
    """Convolution (4, stride, 1), normalisation, LeakyReLU(0.2), as a list."""
    layer = norm_layer(norm, c_out)
    shifted = isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d))                  # the mean cancels a bias
    return [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=not shifted), *([layer] if layer else []), nn.LeakyReLU(0.2)]


class MinibatchDiscrimination(nn.Module):
    """How close each sample lies to the others of its batch: x (N, A) -> o (N, B), each entry in [0, 1].

    M_i = x_i T, T of shape (A, B, C);   o_ib = 1/(N - 1) sum over j != i of exp(-||M_ib - M_jb||_1).

    Salimans et al. 2016, section 3.2. Deviation: a mean where the paper has a sum, without a sample's own term (always
    1), so that o does not depend on the batch size. A batch of one has no others; its o is 0.
    """

    def __init__(self, inputs, kernels=32, kernel_size=8):
        super().__init__()
        self.kernels = kernels
        self.T = nn.Linear(inputs, kernels * kernel_size, bias=False)

    def forward(self, x):
        n = len(x)
        M = self.T(x).float().view(n, self.kernels, -1).transpose(0, 1)               # (B, N, C)
        c = torch.exp(-torch.cdist(M, M, p=1.0))                                      # (B, N, N), 1 on the diagonal
        return ((c.sum(2) - 1) / max(n - 1, 1)).T                                     # (N, B)


class Discriminator(nn.Module):
    """The mirror of `Generator`, a critic for the Wasserstein losses: x (N, channels, H, W) -> raw scores (N,).

    Convolutions (4, 2, 1) with LeakyReLU(0.2) halve the grid as often as the generator doubles it; one convolution as
    large as what is left gives the score. No sigmoid: the losses work on raw scores.

    norm: "batch" (Radford et al. 2015; couples the samples of a batch, so never with a gradient penalty), "none",
    "instance", "layer" (Gulrajani et al. 2017, section 4), "spectral" (Miyato et al. 2018). The first and the last
    convolution carry no normalising layer; spectral normalisation holds for every convolution.
    minibatch: the last layer also sees `MinibatchDiscrimination` of the last level's features; its size hardly depends
    on the image's, as the last grid is always 3 to 7 on the shorter side.
    Raises ValueError for a size, a width or a `norm` that cannot be built.
    """

    def __init__(self, size, channels=3, features=64, max_features=512, norm="none", minibatch=False):
        super().__init__()
        grids, layers, c_in = grid_sizes(size), [], channels
        h, w = grids[-1]
        for c_out in channel_widths(len(grids) - 1, features, max_features):
            layers += downsample_layers(c_in, c_out, norm if layers else "none")
            c_in, h, w = c_out, h // 2, w // 2
        self.levels = nn.Sequential(*layers)
        self.score = nn.Conv2d(c_in, 1, (h, w))
        self.minibatch_discrimination = MinibatchDiscrimination(c_in * h * w) if minibatch else None
        self.score_minibatch = nn.Linear(self.minibatch_discrimination.kernels, 1, bias=False) if minibatch else None
        self.apply(init_weights)
        if norm == "spectral":
            self.apply(lambda m: spectral_norm(m) if isinstance(m, nn.Conv2d) else None)

    def forward(self, x):
        x = self.levels(x)                                                            # (N, c, h, w), shorter side 3..7
        # The last convolution, spelled as a sum in float32: a bf16 score of 200 could not move by less than 1.
        score = (x.float() * self.score.weight).flatten(1).sum(1) + self.score.bias   # (N,)
        if self.minibatch_discrimination is not None:                                 # one layer on (x, o), in two
            score = score + (self.minibatch_discrimination(x.flatten(1)) * self.score_minibatch.weight).sum(1)
        return score


def reflect_to(x, height, width):
    """x (N, C, h, w) extended to the right and below by reflection, as often as it takes: (N, C, height, width)."""
    for dim, side in ((2, height), (3, width)):
        if side > x.shape[dim]:
            period = max(1, 2 * x.shape[dim] - 2)
            k = torch.arange(side, device=x.device) % period
            x = x.index_select(dim, torch.minimum(k, period - k))
    return x


class UNet(nn.Module):
    """pix2pix's generator (Isola et al. 2017, appendix 6.1.1): x (N, c_in, H, W) -> (N, c_out, H, W), both in [-1, 1].

    `depth` convolutions (4, 2, 1) halve the grid, by default floor(log2) of `size`'s shorter side, at most 8 (64 px: 6,
    256: 8); as many transposed ones double it, each fed with the level below and, across the U, with the one
    of its own size. LeakyReLU(0.2) on the way down, ReLU on the way up, tanh at the end; channels as `channel_widths`.
    Dropout in the inner levels of the way up (three of them at 256 px, one at 64 px) is the only noise, where the
    authors' PyTorch code has it, one level further out than in the paper; in eval mode there is none (Deviation: the
    paper leaves it on when testing).
    norm: "instance" (a batch of one works, as in the paper, and training and testing agree), "batch", "layer" or
    "none"; never in the first and the innermost convolution (the paper's batch of one left zeros there; its errata).
    Any H and W, whatever `size`: the image is padded by reflection to a multiple of 2^depth and cropped back.
    upsample: "transposed" or "nearest", as in `Generator`. Raises ValueError for what cannot be built.
    """

    def __init__(self, size, c_in=3, c_out=3, features=64, max_features=512, depth=0, dropout=0.5, norm="instance",
                 upsample="transposed"):
        super().__init__()
        size = grid_sizes(size)[-1]                             # raises for a size out of range
        depth = depth or min(8, min(size).bit_length() - 1)
        if norm == "spectral" or depth < 2:
            raise ValueError(f"norm is none, batch, instance or layer, not {norm!r}, and depth at least 2, not {depth}")
        self.config = dict(size=size, c_in=c_in, c_out=c_out, features=features, max_features=max_features, depth=depth,
                           dropout=dropout, norm=norm, upsample=upsample)
        widths = channel_widths(depth, features, max_features)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for k, (before, here) in enumerate(zip([c_in] + widths, widths)):
            bare = k in (0, depth - 1) or norm == "none"
            down = [nn.LeakyReLU(0.2)] * (k > 0) + [nn.Conv2d(before, here, 4, 2, 1, bias=bare or norm == "layer")]
            self.downs.append(nn.Sequential(*down, *([] if bare else [norm_layer(norm, here)])))
        for k in reversed(range(depth)):                    # up k undoes down k; all but the innermost see both
            below, above = widths[k] * (1 if k == depth - 1 else 2), widths[k - 1] if k else c_out
            bare = k == 0 or norm == "none"
            up = [nn.ReLU(), upsample_layer(below, above, upsample, bias=bare or norm == "layer")]
            up += [] if bare else [norm_layer(norm, above)]
            self.ups.append(nn.Sequential(*up, *([nn.Dropout(dropout)] if dropout and 4 <= k < depth - 1 else [])))
        self.apply(init_weights)

    def forward(self, x):
        h, w = x.shape[2:]
        multiple = 2 ** len(self.downs)
        x = reflect_to(x, -(-h // multiple) * multiple, -(-w // multiple) * multiple)
        skips = [x]
        for down in self.downs:
            skips.append(down(skips[-1]))                                             # (N, c, h / 2^k, w / 2^k)
        x = self.ups[0](skips.pop())
        for up in self.ups[1:]:
            x = up(torch.cat([x, skips.pop()], 1))
        return torch.tanh(x.float())[..., :h, :w]                                     # (N, c_out, H, W)


class PatchGAN(nn.Module):
    """pix2pix's discriminator (Isola et al. 2017, appendix 6.1.2): (N, channels, H, W) -> raw scores (N, h, w).

    One score for each patch. `n_layers` convolutions of stride 2 and two of stride 1, all 4x4 with padding 1 and
    LeakyReLU(0.2) between them; a score sees 16, 34 or 70 pixels across for n_layers 1, 2 or 3. Feed it the input and
    the output, concatenated: torch.cat([x, y], 1). norm: as in `Discriminator`, not on the first and last convolution.
    """

    def __init__(self, channels=6, features=64, max_features=512, n_layers=3, norm="instance"):
        super().__init__()
        widths = channel_widths(n_layers + 1, features, max_features)
        layers = []
        for k, (c_in, c_out) in enumerate(zip([channels] + widths, widths)):
            layers += downsample_layers(c_in, c_out, norm if layers else "none", 2 if k < n_layers else 1)
        self.levels = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(init_weights)
        if norm == "spectral":
            self.apply(lambda m: spectral_norm(m) if isinstance(m, nn.Conv2d) else None)

    def forward(self, x):
        return self.levels(x).float()[:, 0]                                           # (N, h, w)


# ---- Losses and constraints

def critic_loss(f_real, f_fake):
    """L = E[D(x~)] - E[D(x)]: minus the estimate of the Wasserstein distance. Scalar, float32.

    Arjovsky et al. 2017, Algorithm 1 line 5 (with the sign turned, as we minimise); Gulrajani et al. 2017, eq. 3.
    """
    return f_fake.float().mean() - f_real.float().mean()


def generator_loss(f_fake):
    """L = -E[D(G(z))]. Scalar, float32. Arjovsky et al. 2017, Algorithm 1 line 10; Gulrajani et al. 2017, line 12."""
    return -f_fake.float().mean()


def bce_discriminator_loss(f_real, f_fake, smooth=0.0, two_sided=False):
    """L = -E[t log s(D(x)) + (1 - t) log(1 - s(D(x)))] - E[u log s(D(x~)) + (1 - u) log(1 - s(D(x~)))], s the sigmoid.

    Goodfellow et al. 2014, eq. 1, with targets t = 1 and u = 0. Label smoothing (Salimans et al. 2016, section 3.4): t
    = 1 - smooth, one-sided, or also u = smooth with `two_sided`. The best D then has s(D(x)) = (t p + u q) / (p + q),
    for p and q the densities of real and fake: with u > 0 fakes far from any data would be told to stay.
    """
    t, u = torch.full_like(f_real, 1 - smooth), torch.full_like(f_fake, smooth if two_sided else 0.0)
    logits = F.binary_cross_entropy_with_logits
    return logits(f_real.float(), t.float()) + logits(f_fake.float(), u.float())


def bce_generator_loss(f_fake):
    """L = -E[log s(D(G(z)))]: non-saturating. Goodfellow et al. 2014, section 3. The target is 1, never smoothed."""
    return F.softplus(-f_fake.float()).mean()


def hinge_discriminator_loss(f_real, f_fake):
    """L = E[max(0, 1 - D(x))] + E[max(0, 1 + D(x~))]. Miyato et al. 2018, eq. 16. G's is `generator_loss` (eq. 17)."""
    return F.relu(1 - f_real.float()).mean() + F.relu(1 + f_fake.float()).mean()


def relativistic_discriminator_loss(f_real, f_fake):
    """L = E[softplus(-(D(x) - D(x~)))] over pairs (x, x~). Huang et al. 2024, section 2. Without `zero_centred_penalty`
    on real and on fake it need not converge."""
    return F.softplus(f_fake.float() - f_real.float()).mean()


def relativistic_generator_loss(f_real, f_fake):
    """L = E[softplus(-(D(x~) - D(x)))] over pairs (x, x~): G plays the same game with the roles exchanged."""
    return relativistic_discriminator_loss(f_fake, f_real)


def l1_loss(y, fake, m=None):
    """L = E[||y - G(x)||_1], the mean over pixels and channels. Scalar, float32. Isola et al. 2017, eq. 3.

    With a mask m (N, 1, H, W) the mean is over the hole alone, m = 0; for a hole of a quarter that is 4 times as much.
    """
    distance = (y.float() - fake.float()).abs()
    if m is None:
        return distance.mean()
    hole = (1 - m).expand_as(distance)
    return (distance * hole).sum() / hole.sum()


def zero_centred_penalty(D, x):
    """E[||grad_x D(x)||^2]: R1 at real images, R2 at fakes. Scalar, float32. Weigh it by gamma / 2.

    Mescheder et al. 2018, eq. 9, 10; Huang et al. 2024. x: (N, C, H, W), what D sees. As for `gradient_penalty`, D must
    not mix the samples of a batch, and a gradient without a graph raises RuntimeError.
    """
    return input_gradient(D, x).square().sum((1, 2, 3)).mean()


def input_gradient(D, x):
    """grad_x D(x), (N, C, H, W), float32, with a graph to D's weights, without which a penalty on it trains nothing."""
    x = x.detach().requires_grad_(True)
    grad, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    if grad.grad_fn is None:
        raise RuntimeError("the gradient of D carries no graph, so a penalty on it would train nothing: D detaches its "
                           "weights, or is compiled (torch.compile has no double backward)")
    return grad.float()


def gradient_penalty(D, real, fake, one_sided=False):
    """E[(||grad_x D(x^)||_2 - 1)^2] at x^ = eps x + (1 - eps) x~, eps ~ U[0, 1], one eps an image. Scalar, float32.

    Gulrajani et al. 2017, eq. 3 and Algorithm 1 lines 4, 6, 7. With `one_sided` the penalty is
    E[max(0, ||grad_x D(x^)||_2 - 1)^2], WGAN-LP of Petzka et al. 2018: a gradient norm below 1 is free.

    real, fake: (N, C, H, W), what the critic sees (augmented, if it sees augmented images). The norm is taken over
    all of (C, H, W), per sample; norm and square are float32 under any autocast. D must not mix the samples of a batch.
    Raises RuntimeError when the gradient carries no graph.
    """
    eps = torch.rand(len(real), 1, 1, 1, device=real.device)
    x_hat = eps * real + (1 - eps) * fake
    norm = input_gradient(D, x_hat).flatten(1).norm(2, dim=1)                        # (N,)
    excess = F.relu(norm - 1) if one_sided else norm - 1                             # else negative below 1
    return excess.square().mean()


@torch.no_grad()
def clip_weights(D, c):
    """w <- clip(w, -c, c) for every parameter of D. Call it after the update, so that a saved D obeys the bound.

    Arjovsky et al. 2017, Algorithm 1 line 7. Gains and biases of normalising layers are parameters too and are clipped
    with the rest, as in the authors' code; leaving them free would undo the bound.
    """
    for w in D.parameters():
        w.clamp_(-c, c)


# ---- Differentiable augmentation and averaged weights

def random_colour(x):
    """Brightness + U(-0.5, 0.5); saturation x U(0, 2) about a pixel's grey; contrast x U(0.5, 1.5) about the mean."""
    u = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
    x = x + (u[0] - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * u[1])
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (0.5 + u[2])


def random_translation(x, ratio=0.125):
    """Shifts each image by whole pixels, at most about `ratio` of each side, with zero padding (mid-grey)."""
    n, c, h, w = x.shape
    dy, dx = int(h * ratio + 0.5), int(w * ratio + 0.5)
    rows = torch.arange(h, device=x.device) + torch.randint(2 * dy + 1, (n, 1), device=x.device)                # (N, h)
    cols = torch.arange(w, device=x.device) + torch.randint(2 * dx + 1, (n, 1), device=x.device)                # (N, w)
    x = F.pad(x, (dx, dx, dy, dy)).gather(2, rows[:, None, :, None].expand(n, c, h, w + 2 * dx))
    return x.gather(3, cols[:, None, None].expand(n, c, h, w))


def random_cutout(x, ratio=0.5):
    """Sets one rectangle of about `ratio` of each side to 0 in each image, its centre uniform over the image."""
    def inside(side):
        length = int(side * ratio + 0.5)
        first = torch.randint(0, side + 1 - length % 2, (len(x), 1), device=x.device) - length // 2
        offset = torch.arange(side, device=x.device) - first
        return (offset >= 0) & (offset < length)                                      # (N, side)

    rows, columns = inside(x.shape[2]), inside(x.shape[3])
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)


AUGMENTATIONS = {"color": random_colour, "translation": random_translation, "cutout": random_cutout}


def diff_augment(x, policy):
    """T(x): random, differentiable in x, drawn anew for every image. Zhao et al. 2020, section 3.2.

    policy: names out of color, translation, cutout, joined by commas and applied in the order given; "" is the
    identity. Apply it to every image D sees, real and fake, in D's step and in G's, and take a gradient penalty on
    the augmented images. Nothing is clamped to [-1, 1] afterwards. Raises ValueError for a name it does not know.
    """
    for name in filter(None, map(str.strip, policy.split(","))):
        if name not in AUGMENTATIONS:
            raise ValueError(f"--augment knows {', '.join(AUGMENTATIONS)}; not {name!r}")
        x = AUGMENTATIONS[name](x)
    return x


@torch.no_grad()
def update_ema(G_ema, G, beta, step):
    """theta_ema <- b theta_ema + (1 - b) theta,  b = min(beta, (1 + step) / (10 + step)).

    The ramp keeps the first, random weights from lingering: at step t, from 1, the average reaches back about t / 9
    steps, until beta's own 1 / (1 - beta) is shorter. BatchNorm's statistics are averaged too: the latest, of the raw
    G's activations, would shift brightness and contrast of the averaged G.
    """
    b = min(beta, (1 + step) / (10 + step))
    for average, theta in zip(G_ema.state_dict().values(), G.state_dict().values()):
        average.lerp_(theta, 1 - b) if theta.is_floating_point() else average.copy_(theta)


def save_generator(path, G, **extra):
    """Write to `path` what `load_generator` needs, and `extra`: plain values and tensors."""
    torch.save({"network": type(G).__name__, "config": G.config, "G_ema": G.state_dict()} | extra, path)


def load_generator(path, device="cpu"):
    """The trained generator in a file, in eval mode, its parameters frozen: `G = load_generator(path);
    G(torch.randn(16, G.config["latent"]))`; of a pix2pix run the `UNet`.

    path: a saved generator (runs/NAME/generators/step-*.pt), a checkpoint (runs/NAME/checkpoint.pt) or a run folder.
    Nothing but tensors and plain values is unpickled. Raises OSError when there is no such file or it is another one.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a run folder, its checkpoint.pt or a file in generators/")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():                              # torch.load looks at no checksum
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        G = {"Generator": Generator, "UNet": UNet}[saved.get("network", "Generator")](**saved["config"])
        G.load_state_dict(saved.get("state", saved)["G_ema"])
    except Exception as error:                              # a damaged file makes torch.load raise almost anything
        raise OSError(f"{path} is no file that a training script wrote, or it is damaged "
                      f"({type(error).__name__}: {str(error).partition(chr(10))[0][:100]})") from error
    return G.to(device).eval().requires_grad_(False)
