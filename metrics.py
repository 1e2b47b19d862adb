"""Scores as pure functions of features or images. Needs numpy and torch only and may be pasted into a notebook.

Features are (N, D), images (N, C, H, W), arrays or tensors on any device, real before fake. Statistics are computed in
float64 on the CPU. NotDefined, a ValueError, is raised where a docstring says so or names a least number.

    Dowson and Landau 1982     The Frechet distance between multivariate normal distributions
    Wang et al. 2003           Multi-scale structural similarity for image quality assessment
    Wang et al. 2004           Image quality assessment: from error visibility to structural similarity
    van der Maaten et al. 2008 Visualizing data using t-SNE                          JMLR 9
    Salimans et al. 2016       Improved techniques for training GANs                 arXiv 1606.03498
    Heusel et al. 2017         GANs trained by a two time-scale update rule          arXiv 1706.08500
    Binkowski et al. 2018      Demystifying MMD GANs                                 arXiv 1801.01401
    Kynkaanniemi et al. 2019   Improved precision and recall metric                  arXiv 1904.06991
    Naeem et al. 2020          Reliable fidelity and diversity metrics               arXiv 2002.09797
    Alaa et al. 2022           How faithful is your synthetic data?                  arXiv 2102.08921
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the five scales, Wang et al. 2003


class NotDefined(ValueError):
    """A score is not defined for these features or images."""


def double(x):
    """An array or a tensor as a float64 tensor on the CPU."""
    return torch.as_tensor(x).detach().cpu().double()


# ---- Distances between distributions of features

def statistics(x):
    """Mean (D,) and covariance (D, D) with N - 1, both float64, of features (N, D). Needs two images."""
    x = double(x)
    if len(x) < 2:
        raise NotDefined(f"FID needs at least two images of each kind, got {len(x)}")
    mu = x.mean(0)
    return mu, (x - mu).T @ (x - mu) / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """||mu1 - mu2||^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of two Gaussians. Dowson and Landau 1982.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of R^T S2 R, which is symmetric, for any R R^T = S1.
    mu: (D,), sigma: (D, D), arrays or tensors. NotDefined for two different D.
    """
    mu1, sigma1, mu2, sigma2 = map(double, (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape:
        raise NotDefined(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:                                              # singular: some features are constant
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def fid(real, fake):
    """Frechet Inception distance of features (N, D) and (M, D). Heusel et al. 2017, eq. 6.

    Biased upwards, the more the smaller N and M: compare it only at equal numbers. With fewer images than D the trace
    is the sum of the singular values of X Y^T / sqrt((N - 1)(M - 1)), X, Y centred: equal, with less rounding.
    """
    real, fake = double(real), double(fake)
    if not 2 <= min(len(real), len(fake)) < real.shape[1]:
        return frechet_distance(*statistics(real), *statistics(fake))
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (real, fake))
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return float((real.mean(0) - fake.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * trace)


def kid(real, fake, subsets=100, subset_size=1000, seed=0):
    """Kernel Inception distance: (mean, standard deviation) over subsets. Binkowski et al. 2018.

    MMD^2 = sum over i != j of [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 / m^2 sum over i, j of k(x_i, y_j), with
    k(x, y) = (x . y / D + 1)^3 and subsets of m = min(N, M, subset_size) > 1 without replacement. Unbiased.
    """
    real, fake, random = double(real), double(fake), np.random.RandomState(seed)
    m = min(len(real), len(fake), subset_size)
    if m < 2:
        raise NotDefined(f"KID needs at least two images of each kind, got {len(real)} and {len(fake)}")
    subsets = 1 if m == len(real) == len(fake) else subsets                           # each would be the whole set
    in_real, in_fake = (torch.zeros(subsets, len(f), dtype=torch.float64) for f in (real, fake))
    for i, j in zip(in_real, in_fake):                      # a row per subset, 1 for each image in it
        i[random.permutation(len(i))[:m]] = j[random.permutation(len(j))[:m]] = 1
    values, within = 0, 1 / (m * (m - 1))                   # values: one of each subset
    for x, y, in_x, in_y, weight in ((real, real, in_real, in_real, within), (fake, fake, in_fake, in_fake, within),
                                     (real, fake, in_real, in_fake, -2 / m**2)):
        for i in range(0, len(x), 1024):
            k = (x[i:i + 1024] @ y.T / x.shape[1] + 1) ** 3
            if x is y:
                k.diagonal(i).zero_()                       # i != j
            values = values + weight * (in_x[:, i:i + 1024] @ k * in_y).sum(1)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits, splits=10, seed=2020):
    """exp E_x KL(p(y|x) || p(y)), (mean, standard deviation) over `splits` parts. Salimans et al. 2016, section 4.

    logits: (N, classes), without the bias of the last layer, as in the published code; they are shuffled first.
    """
    n, scores = len(logits), []
    logits = double(logits)[np.random.RandomState(seed).permutation(n)]               # 2020 as in torch-fidelity
    for part in logits.tensor_split([k * n // splits for k in range(1, splits)]):
        log_p = part.log_softmax(1)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))   # stays finite for classes of probability 0
        scores.append(float((log_p.exp() * (log_p - log_q)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# ---- Scores of neighbourhoods of features

def kth_neighbour_distance(x, k, block=1024):
    """Distance of each x_i to its k-th nearest neighbour among the others: (N, D) -> (N,). Needs more than k images."""
    if len(x) <= k:
        raise NotDefined(f"the {k}-th nearest neighbour needs more than {k} images, got {len(x)}")
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1, 1).values for rows in x.split(block)])


def precision_recall(real, fake, k=3, block=1024):
    """Share of fakes in the real manifold, share of reals in the fake manifold: the union of balls around its points,
    whose radii reach to their k-th neighbours. Kynkaanniemi et al. 2019, eq. 1, 2."""
    real, fake = double(real), double(fake)
    real_radius, fake_radius = kth_neighbour_distance(real, k), kth_neighbour_distance(fake, k)
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool), []
    for rows, radius in zip(real.split(block), real_radius.split(block)):
        d = torch.cdist(rows, fake)
        precise |= (d <= radius[:, None]).any(0)
        recalled.append((d <= fake_radius).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def density_coverage(real, fake, k=5, block=1024):
    """Density: number of real balls that a fake lies in, over k; may exceed 1. Coverage: share of real balls that hold
    a fake. Naeem et al. 2020, eq. 3, 4; balls as in `precision_recall`."""
    real, fake = double(real), double(fake)
    hits, covered = 0, []
    for rows, radius in zip(real.split(block), kth_neighbour_distance(real, k).split(block)):
        inside = torch.cdist(rows, fake) < radius[:, None]
        hits += int(inside.sum())
        covered.append(inside.any(1))
    return hits / (k * len(fake)), float(torch.cat(covered).double().mean())


# ---- Scores of images

@torch.no_grad()
def diversity(x):
    """Mean distance between two images of a batch, per pixel: E over pairs i < j of ||x_i - x_j||_2 / sqrt(C H W).

    Of samples, over that of as many real images, it detects mode collapse: near 1 they differ as real ones do, near 0
    they are all alike. Blur lowers it, noise raises it; it does not measure quality.
    """
    x = torch.as_tensor(x).float().flatten(1).cpu()          # MPS has no pdist
    return F.pdist(x).mean() / x.shape[1] ** 0.5


def psnr(a, b, data_range, known=None):
    """10 log10(data_range^2 / mean (a - b)^2) in dB of each pair, (N, C, H, W) twice -> (N,). With a mask known
    (N, 1, H, W) the mean is over the hole alone, known == 0. It is clamped at 1e-10, so that PSNR is finite."""
    a, b = double(a), double(b)
    hole = torch.ones_like(a[:, :1]) if known is None else 1 - double(known)
    error = ((a - b).square() * hole).flatten(1).sum(1) / (hole.flatten(1).sum(1) * a.shape[1])
    return 10 * torch.log10(data_range**2 / error.clamp(min=1e-10))


def ssim(a, b, data_range):
    """Structural similarity of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2004, eq. 13.

    Windows: Gaussian, 11x11, sigma 1.5, those that lie inside the image; C1 = (0.01 L)^2, C2 = (0.03 L)^2, L =
    data_range (2 for [-1, 1], 255 for uint8); means over windows and channels. NotDefined for sides under 11.
    """
    return similarity_maps(a, b, data_range)[0].mean((1, 2, 3))


def similarity_maps(a, b, data_range):
    """SSIM of each window, and its contrast-structure factor alone: (N, C, H - 10, W - 10) each."""
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11:
        raise NotDefined(f"SSIM uses windows of 11x11 pixels, and the images are {a.shape[2]}x{a.shape[3]}")
    g = torch.exp(-(torch.arange(11, dtype=a.dtype) - 5).square() / (2 * 1.5**2))
    x = torch.cat([a, b, a * a, b * b, a * b], 1)           # (N, 5 C, H, W), each channel blurred by itself
    g = (g / g.sum()).expand(x.shape[1], 1, 1, 11)
    x = F.conv2d(F.conv2d(x, g, groups=x.shape[1]), g.transpose(2, 3), groups=x.shape[1])
    mean_a, mean_b, aa, bb, ab = x.chunk(5, 1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * structure, structure


def ms_ssim(a, b, data_range, scales=5):
    """SSIM over scales of each pair, (N, C, H, W) twice -> (N,). Wang et al. 2003, eq. 7.

    The product over scales j of structure_j^w_j, with SSIM itself at the last scale, halving by 2x2 means; per channel,
    then the mean. Fewer than 5 scales take the first weights, scaled to sum to 1: not comparable with 5. Negative
    structure counts as 0. NotDefined for sides under 11 * 2^(scales - 1).
    """
    a, b = double(a), double(b)
    product, weights = 1, MS_SSIM_WEIGHTS[:scales]
    for j, w in enumerate(weights):
        whole, structure = (x.mean((2, 3)).clamp(min=0) for x in similarity_maps(a, b, data_range))
        product = product * (whole if j == scales - 1 else structure) ** (w / sum(weights))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product.mean(1)                                  # (N, C) -> (N,)


def tsne(x, perplexity=30.0, steps=1000, seed=0):
    """Exact t-SNE: (N, D) -> (N, 2), float64. van der Maaten and Hinton 2008, algorithm 1. Needs four images.

    p_ij from Gaussians whose widths give each point the perplexity; minimised is KL(P || Q), q_ij ~ 1 / (1 + ||y_i -
    y_j||^2); gradient 4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + ||y_i - y_j||^2).
    Deviation: PCA to 50 dimensions, learning rate max(N / 12, 50), P times 12 in the first quarter, momentum 0.5 there
    and 0.8 later, start from two principal components and noise of `seed`.
    """
    x, n = double(x), len(x)
    if n < 4:
        raise NotDefined(f"t-SNE needs at least 4 images, got {n}")
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    x = u[:, :50] * s[:50]                                  # (N, 50)
    p = affinities(torch.cdist(x, x).square(), min(perplexity, (n - 1) / 3))
    p = (p + p.T) / (2 * n)
    noise = torch.from_numpy(np.random.RandomState(seed).standard_normal((n, 2)))
    y = 1e-4 * (x[:, :2] / x[:, 0].std() + 0.1 * noise)
    update, gains = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < steps // 4
        w = 1 / (1 + torch.cdist(y, y).square())
        w.fill_diagonal_(0)
        pull = ((12 if early else 1) * p - w / w.sum()) * w
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)                         # (N, 2)
        gains = torch.where((grad > 0) == (update > 0), gains * 0.8, gains + 0.2).clamp(min=0.01)
        update = (0.5 if early else 0.8) * update - max(n / 12, 50) * gains * grad
        y = y + update
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
    for i in range(0, len(images), 256):
        x = torch.as_tensor(images[i:i + 256]).float().cpu()
        if x.shape[1] == 3:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        x = F.adaptive_avg_pool2d(x, (32, 32)).flatten(1)
        out.append(F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-3))
    return torch.cat(out)


def nearest(x, y, block=1024):
    """Distance and index of the y_j nearest to each x_i, but not itself; of rows of length 1: d^2 = 2 - 2 x . y."""
    found = []
    for i in range(0, len(x), block):
        similarity = x[i:i + block] @ y.T
        if x is y:
            similarity.diagonal(i).fill_(-2)
        found.append(similarity.max(1))
    best, index = (torch.cat(parts) for parts in zip(*found))
    return (2 - 2 * best).clamp(min=0).sqrt(), index


def memorisation(train, heldout, fake, mirror=False):
    """Whether generated images are copies of training images: a dict of numbers. uint8 (N, C, H, W) each.

    d(x): distance of x to the nearest training image, by `fingerprints`. Held-out real images calibrate it: about 1 %
    of fakes that copy nothing lie nearer than the 1st percentile of theirs, and a share c of copies makes that 1 % + c.
      share     of the fakes nearer than that; low, high: its 95 % interval (Wilson); expected: r / (H + 1), where the
                percentile is the r-th smallest of H
      chance    p-value of that share, if fakes and held-out images are of one distribution; alarm: it is under 1 %
      authentic, authentic_held_out: AuthPct (Alaa et al. 2022): images whose nearest training image has a training
                neighbour nearer than they are. Only their difference says anything
      ratio     median d of fakes over that of held-out images; far above 1: the fakes are unlike any real image
      pairs     (fake, training image, d, mirrored) of the eight closest
    mirror: also compare with the mirrored training images. Needs 20 held-out images, independent ones: near copies on
    one side of the split, as of video frames, raise false alarms. Held-out images that are training images count not.
    """
    known = fingerprints(train)
    bank = torch.cat([known, known.view(-1, 32, 32).flip(2).flatten(1)]) if mirror else known
    (d_heldout, nearest_heldout), (d_fake, nearest_fake) = (nearest(fingerprints(x), bank) for x in (heldout, fake))
    n, other = len(d_fake), d_heldout > 0.05                # the same image, made grey twice: up to 0.04
    d_heldout, nearest_heldout, h = d_heldout[other], nearest_heldout[other], int(other.sum())
    if h < 20:
        raise NotDefined(f"the check for copies needs 20 held-out images that are no training images, got {h}")
    own, r = nearest(known, known)[0], max(1, round(h / 100))
    below = int((d_fake < d_heldout.sort().values[r - 1]).sum())
    (low, high), chance = wilson_interval(below, n), rank_p_value(below, n, r, h)
    return dict(
        share=below / n, low=low, high=high, expected=r / (h + 1), chance=chance, alarm=chance < 0.01,
        authentic=float((d_fake > own[nearest_fake % len(known)]).double().mean()),
        authentic_held_out=float((d_heldout > own[nearest_heldout % len(known)]).double().mean()),
        ratio=float(d_fake.median() / d_heldout.median()), fakes=n, held_out=h, train=len(known),
        pairs=[(int(k), int(nearest_fake[k]) % len(known), float(d_fake[k]), bool(nearest_fake[k] >= len(known)))
               for k in d_fake.argsort()[:8]])


def wilson_interval(k, n, z=1.96):
    """95 % interval of a share, k of n. Wilson 1927."""
    p, centre = k / n, (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rank_p_value(c, n, r, h):
    """P(at least c of n fakes lie below the r-th smallest of h held-out values), if all n + h come from one
    distribution: at most r - 1 of the smallest c + r - 1 values are then held out. Hypergeometric."""
    first = c + r - 1
    return sum(math.comb(h, j) * math.comb(n, first - j) for j in range(r)) / math.comb(n + h, first)
