"""Every score as a pure function of features or of images."""

import math

import numpy as np
import torch
import torch.nn.functional as F

import runtime


@torch.no_grad()
def diversity(x):
    """Mean distance of two pictures of a batch, per pixel: E over pairs i < j of ||x_i - x_j||_2 / sqrt(C H W).

    Of 64 samples, divided by that of 64 real pictures, it tells collapse: near 1 they differ as much as real ones do,
    near 0 they are all alike. (Blur lowers it somewhat, noise raises it; it is no measure of quality.)
    """
    return F.pdist(x.float().flatten(1).cpu()).mean() / x[0].numel() ** 0.5            # Apple's GPUs have no pdist


@torch.no_grad()
def masked_psnr(y, fake, m=None):
    """10 log10(2^2 / mean square error), in dB, of each picture: (N,). For pictures in [-1, 1], hence the 2.

    With a mask m (N, 1, H, W) the error is over the hole alone, m = 0; over the whole picture, the known pixels pasted
    back, it would be 10 log10(1 / share of the hole) more: 6.02 dB for a quarter.
    """
    hole = torch.ones_like(y[:, :1]) if m is None else 1 - m
    error = ((y.float() - fake.float()).square() * hole).sum((1, 2, 3)) / (hole.sum((1, 2, 3)) * y.shape[1])
    return 10 * torch.log10(4 / error.clamp(min=1e-10))                               # equal pictures: 106 dB


def double(x):
    """An array or a tensor as a float64 tensor on the CPU: statistics are always taken in float64."""
    return torch.as_tensor(x).detach().cpu().double()


def statistics(x):
    """Mean (D,) and covariance (D, D) with N - 1, both float64, of features (N, D). ValueError for a single picture."""
    x = double(x)
    if len(x) < 2:
        raise ValueError("FID needs at least two pictures of each kind")
    mu = x.mean(0)
    return mu, (x - mu).T @ (x - mu) / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of two Gaussians. Dowson and Landau 1982.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of R^T S2 R, which is symmetric, for any R R^T = S1.
    mu: (D,), sigma: (D, D), arrays or tensors.
    """
    mu1, sigma1, mu2, sigma2 = map(double, (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:                                              # singular: some features never vary
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def fid(real, fake):
    """Frechet Inception distance of features (N, D) and (M, D). Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    With fewer pictures than dimensions the trace is the sum of the singular values of X Y^T / sqrt((N - 1)(M - 1)), X
    and Y centred: the same number, free of the rounding of eigenvalues that should be 0.
    """
    real, fake = double(real), double(fake)
    if not 2 <= min(len(real), len(fake)) < real.shape[1]:
        return frechet_distance(*statistics(real), *statistics(fake))
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (real, fake))
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return float((real.mean(0) - fake.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * trace)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Kernel Inception distance: (mean, standard deviation) over subsets. Binkowski et al. 2018 (arXiv 1801.01401).

    MMD^2 = sum over i != j of [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 / m^2 sum over i, j of k(x_i, y_j), with
    k(x, y) = (x . y / D + 1)^3 and subsets of m = min(N, M, subset_size) drawn without replacement. Unbiased, so it may
    be slightly negative.
    """
    real, fake, random = double(real), double(fake), np.random.RandomState(seed)
    m = min(len(real), len(fake), subset_size)
    if m < 2:
        raise ValueError("KID needs at least two pictures of each kind")
    if m == len(real) == len(fake):
        subsets = 1                                         # every subset is the whole set
    chosen = [torch.zeros(subsets, len(f), dtype=torch.float64) for f in (real, fake)]
    for i, j in zip(*chosen):                               # a row for each subset, 1 where it has the picture
        i[random.permutation(len(i))[:m]] = j[random.permutation(len(j))[:m]] = 1

    def sums(x, y, in_x, in_y):
        total = 0
        for rows in runtime.batched_slices(len(x), 1024):
            k = (x[rows] @ y.T / x.shape[1] + 1) ** 3
            if x is y:
                k[torch.arange(len(k)), torch.arange(rows.start, rows.stop)] = 0
            total = total + (in_x[:, rows] @ k * in_y).sum(1)
        return total                                        # (subsets,)

    (i, j), within = chosen, m * (m - 1)
    values = (sums(real, real, i, i) + sums(fake, fake, j, j)) / within - 2 / m**2 * sums(real, fake, i, j)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits, splits=10, seed=2020):
    """exp E_x KL(p(y|x) || p(y)), (mean, standard deviation) over `splits` parts. Salimans et al. 2016, section 4.

    logits: (N, classes), without the bias of the last layer, as in the published code; float64 from there on. The order
    is shuffled first (torch-fidelity's seed; None leaves it).
    """
    logits, scores = double(logits), []
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    for k in range(splits):
        log_p = logits[k * len(logits) // splits:(k + 1) * len(logits) // splits].log_softmax(1)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))   # finite for classes that nothing is likely to be
        scores.append(float((log_p.exp() * (log_p - log_q)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def distances(x, y):
    """||x_i - y_j|| of (N, D) and (M, D) -> (N, M), float64."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0).sqrt()


def radii(x, k, block=1024):
    """Distance of each x_i to its k-th nearest neighbour among the others: (N, D) -> (N,)."""
    if len(x) <= k:
        raise ValueError(f"the {k}-th nearest neighbour needs more than {k} pictures; there are {len(x)}")
    return torch.cat([distances(x[rows], x).kthvalue(k + 1, 1).values for rows in runtime.batched_slices(len(x), block)])


def precision_recall(real, fake, k=3, block=1024):
    """Share of fakes within the real manifold, and of reals within the fake one. Kynkaanniemi et al. 2019, eq. 1, 2.

    A manifold is the union of the balls about its points that reach to their k-th neighbour.
    """
    real, fake = double(real), double(fake)
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.bool)
    covered = []
    for rows in runtime.batched_slices(len(real), block):
        d = distances(real[rows], fake)
        inside |= (d <= real_radius[rows, None]).any(0)
        covered.append((d <= fake_radius).any(1))
    return float(inside.double().mean()), float(torch.cat(covered).double().mean())


def density_coverage(real, fake, k=5, block=1024):
    """Density: real balls that a fake lies in, over k. Coverage: share of real balls with a fake in them. Naeem et al.
    2020, eq. 3, 4. Density may exceed 1."""
    real, fake = double(real), double(fake)
    radius, hits, covered = radii(real, k), 0, []
    for rows in runtime.batched_slices(len(real), block):
        within = distances(real[rows], fake) < radius[rows, None]
        hits += int(within.sum())
        covered.append(within.any(1))
    return hits / (k * len(fake)), float(torch.cat(covered).double().mean())


def psnr(a, b, data_range):
    """10 log10(data_range^2 / mean (a - b)^2) in dB of each pair, over all pixels: (N, C, H, W) twice -> (N,)."""
    a, b = double(a), double(b)
    return 10 * torch.log10(data_range**2 / (a - b).square().flatten(1).mean(1))


def ssim(a, b, data_range):
    """Structural similarity of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2004, eq. 13.

    Windows: Gaussian, 11x11, sigma 1.5, those that lie inside the picture; C1 = (0.01 L)^2, C2 = (0.03 L)^2, L =
    data_range (2 for [-1, 1], 255 for uint8); means over windows and channels. ValueError for sides under 11.
    """
    return similarity_maps(a, b, data_range)[0].mean((1, 2, 3))


def similarity_maps(a, b, data_range):
    """SSIM of each window, and its contrast-structure factor alone: (N, C, H - 10, W - 10) each."""
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM looks through windows of 11x11 pixels, and the pictures are {a.shape[2]}x{a.shape[3]}")
    g = torch.exp(-(torch.arange(11, dtype=a.dtype) - 5).square() / (2 * 1.5**2))
    g = (g / g.sum()).expand(a.shape[1], 1, 1, 11)

    def blur(x):
        return F.conv2d(F.conv2d(x, g, groups=x.shape[1]), g.transpose(2, 3), groups=x.shape[1])

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * structure, structure


SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)           # the exponents of Wang et al. 2003


def ms_ssim(a, b, data_range, scales=5):
    """SSIM over scales of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2003 (Asilomar), eq. 7.

    The product over scales j of structure_j^w_j, SSIM itself at the last; halved by 2x2 means in between; per channel,
    then the mean. scales under 5 take the first exponents, scaled to sum to 1: a number of its own. Negative structure
    counts as 0. ValueError when a side is under 11 x 2^(scales - 1).
    """
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11 * 2 ** (scales - 1):
        raise ValueError(f"{scales} scales need sides of {11 * 2 ** (scales - 1)} and more, and the pictures are "
                         f"{a.shape[2]}x{a.shape[3]}")
    product = 1
    for j, w in enumerate(SCALES[:scales]):
        whole, structure = (x.mean((2, 3)).clamp(min=0) for x in similarity_maps(a, b, data_range))
        product = product * (whole if j == scales - 1 else structure) ** (w / sum(SCALES[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)                                                            # (N, C) -> (N,)


def tsne(x, perplexity=30.0, steps=1000, seed=0, progress=False):
    """Exact t-SNE: (N, D) -> (N, 2), float64. van der Maaten and Hinton 2008, algorithm 1.

    x is first brought to at most 50 dimensions by PCA. p_ij from Gaussians whose widths give each point the perplexity;
    minimised is KL(P || Q), q_ij ~ 1 / (1 + ||y_i - y_j||^2); gradient 4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + ||y_i -
    y_j||^2). Learning rate N / 12 and at least 50, P times 12 in the first quarter, momentum 0.5, later 0.8, and gains,
    as usual today; it starts from the first two principal components with a little noise of `seed`.
    """
    x = double(x)
    n = len(x)
    if n < 4:
        raise ValueError(f"t-SNE needs at least 4 pictures; there are {n}")
    perplexity = min(perplexity, (n - 1) / 3)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = u[:, :50] * s[:50]                                                            # (N, 50)
    p = affinities(distances(x, x).square(), perplexity)
    p = (p + p.T) / (2 * n)
    noise = torch.from_numpy(np.random.RandomState(seed).standard_normal((n, 2)))
    y = 1e-4 * (x[:, :2] / x[:, 0].std() + 0.1 * noise)
    step, gains = torch.zeros_like(y), torch.ones_like(y)
    for rows in runtime.batched_slices(steps, 1, "t-SNE" if progress else ""):
        early = rows.start < steps // 4
        w = 1 / (1 + distances(y, y).square())
        w.fill_diagonal_(0)
        pull = ((12 if early else 1) * p - w / w.sum()) * w
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)                         # (N, 2)
        gains = torch.where((grad > 0) == (step > 0), gains * 0.8, gains + 0.2).clamp(min=0.01)
        step = (0.5 if early else 0.8) * step - max(n / 12, 50) * gains * grad
        y = y + step
        y = y - y.mean(0)
    return y


def affinities(d2, perplexity):
    """p_j|i ~ exp(-beta_i d2_ij), rows sum to 1, beta_i by bisection so that the entropy of each is log perplexity."""
    d2 = (d2 / d2.mean()).fill_diagonal_(math.inf)          # p_i|i = 0
    low, high = (torch.full((len(d2), 1), end, dtype=d2.dtype) for end in (-60.0, 60.0))              # of log beta
    for _ in range(60):
        middle = (low + high) / 2
        p = (-middle.exp() * d2).softmax(1)
        wide = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return p


def fingerprints(images):
    """uint8 (N, C, H, W) -> float32 (N, 1024): grey, 32x32 by area, mean 0, length 1. Dot products are correlations."""
    out = []
    for rows in runtime.batched_slices(len(images), 256):
        x = torch.from_numpy(np.ascontiguousarray(images[rows])).float()
        if x.shape[1] == 3:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        x = F.adaptive_avg_pool2d(x, (32, 32)).flatten(1)
        out.append(F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3))
    return torch.cat(out)


def nearest(x, y, itself=False, block=1024):
    """Of each x_i the nearest y_j: distances (N,) and places j (N,), for rows of length 1, ||x - y||^2 = 2 - 2 x . y.

    itself: x and y are the same rows, and a row is not its own neighbour.
    """
    found = []
    for rows in runtime.batched_slices(len(x), block):
        likeness = x[rows] @ y.T
        if itself:
            likeness[torch.arange(len(likeness)), torch.arange(rows.start, rows.stop)] = -2
        found.append(likeness.max(1))
    best, place = (torch.cat(parts) for parts in zip(*found))
    return (2 - 2 * best).clamp(min=0).sqrt(), place


def memorisation(train, held_out, fake, mirror=False):
    """Whether generated pictures are copies of training pictures: a dict of numbers. uint8 (N, C, H, W) each.

    d(x): distance of x to the nearest training picture, by `fingerprints`. Real pictures that were held out say what is
    usual: about 1 % of honest fakes lie nearer than the 1st percentile of theirs, and a share c of copies makes that
    about 1 % + c.
      share     of the fakes nearer than that; low, high: its 95 % interval (Wilson); expected: r / (H + 1), where the
                percentile is the r-th smallest of H
      chance    to find so many or more if fakes and held-out pictures came from one distribution (exact: ranks).
                alarm: it is under 1 %
      authentic, authentic_held_out: AuthPct (Alaa et al. 2022): pictures whose nearest training picture has a training
                neighbour nearer than they are. To be read beside one another only
      ratio     median d of fakes over that of held-out pictures; far over 1: the fakes are unlike any real picture
      pairs     (fake, training picture, d, mirrored) of the eight closest
    mirror: also compare with the training pictures mirrored. Raises ValueError for fewer than 20 held out.
    """
    if len(held_out) < 20 or len(train) < 2:
        raise ValueError(f"the check for copies is calibrated on held-out pictures and needs 20 of them; there are "
                         f"{len(held_out)}")
    bank = known = fingerprints(train)
    if mirror:
        bank = torch.cat([known, known.view(-1, 32, 32).flip(2).flatten(1)])
    own, _ = nearest(known, known, itself=True)
    d_held_out, place_held_out = nearest(fingerprints(held_out), bank)
    d_fake, place = nearest(fingerprints(fake), bank)
    n, h = len(d_fake), len(d_held_out)
    r = max(1, round(h / 100))
    below = int((d_fake < d_held_out.sort().values[r - 1]).sum())
    low, high = wilson(below, n)
    chance = rank_chance(below, n, r, h)
    closest = d_fake.argsort()[:8]
    return dict(
        share=below / n, low=low, high=high, expected=r / (h + 1), chance=chance, alarm=chance < 0.01,
        authentic=float((d_fake > own[place % len(known)]).double().mean()),
        authentic_held_out=float((d_held_out > own[place_held_out % len(known)]).double().mean()),
        ratio=float(d_fake.median() / d_held_out.median().clamp(min=1e-6)), fakes=n, held_out=h, train=len(known),
        pairs=[(int(k), int(place[k]) % len(known), float(d_fake[k]), bool(place[k] >= len(known))) for k in closest])


def wilson(k, n, z=1.96):
    """Interval for a share of which k of n were found. Wilson 1927."""
    p, centre = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rank_chance(c, n, r, h):
    """P(at least c of n fakes lie below the r-th smallest of h held-out values), if all n + h come from one
    distribution: among the first c + r - 1 of all there are then at most r - 1 held out. Hypergeometric."""
    def log_choose(a, b):
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    first = c + r - 1
    return min(1.0, sum(math.exp(log_choose(h, j) + log_choose(n, first - j) - log_choose(n + h, first))
                        for j in range(min(r, first + 1)) if first - j <= n))
