"""Train pix2pix: pictures from pictures. On pairs, or on pairs made of any folder of single pictures.

    python train_pix2pix.py                                              the built-in demo: fill holes, minutes on a CPU
    python train_pix2pix.py --data ./faces --task complete --flip        fill holes of any shape
    python train_pix2pix.py --data ./faces --task colorize               grey to colour
    python train_pix2pix.py --data ./faces --task enhance                small and grainy to large and clean
    python train_pix2pix.py --data ./faces --task edges                  line drawing to picture
    python train_pix2pix.py --data ./facades --task pairs --size 256     files side by side, or folders A and B
    python train_pix2pix.py --data ./facades --task pairs --overfit-check    can it learn eight of these pairs at all?
    python train_pix2pix.py --resume runs/pix2pix-faces-1                go on after Ctrl-C, exactly

The networks, the objective and the defaults are those of Isola et al. 2017 (arXiv 1611.07004): a U-Net G turns x into
G(x), a PatchGAN D tells (x, y) from (x, G(x)), and G* = arg min_G max_D L_cGAN(G, D) + lambda L_L1(G), its eq. 4.
"""

import copy

import torch

import cli
import data
import decode
import gan
import inpainting
import metrics
import pairs
import plots
import runs
import runtime

# What follows from the task. lambda: 100 is the paper's, of a mean over the picture; a mean over the hole is larger.
TASKS = {
    "complete": dict(l1=25.0, warm_up=1000),                # holes to picture; for a hole of a quarter 25 x 4 = 100
    "colorize": dict(l1=100.0, warm_up=0),                  # grey to colour
    "enhance": dict(l1=100.0, warm_up=0),                   # small and grainy to large and clean
    "edges": dict(l1=100.0, warm_up=0),                     # line drawing to picture
    "pairs": dict(l1=100.0, warm_up=0),                     # as they are on disk
}


# What suits the demo: whole teeth within some minutes on two cores.
DEMO = dict(size="32", features=32, batch=16, steps=1500, warm_up=200, log_every=50, sample_every=100, save_every=500)


# The charts of losses.png: title and numbers of the log.
PANELS = [("losses of the game (both are minimised)", ("loss_D", "loss_G")),
          ("L1, of the task's pixels: in training, and on held-out pictures", ("l1", "l1_heldout")),
          ("PSNR in dB on held-out pictures, and of doing next to nothing", ("psnr_heldout", "psnr_trivial")),
          ("probabilities that D gives before the update", ("D_x", "D_G_z"))]


def parse_arguments(argv=None):
    parser = cli.Parser("train_pix2pix.py", __doc__, {
        **{f"--task {name}": defaults for name, defaults in TASKS.items()}, "--data demo": DEMO})
    add = parser.add_argument_group("the method").add_argument
    add("--task", default="complete", choices=TASKS, help="what to learn: pairs, as they are on disk; the others make "
        "them of single pictures (complete)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"), help="of pairs: A is the left half, or the folder A "
        "(AtoB)")
    add("--mask", default="center,box,strokes,half,random", metavar="KINDS", help="of complete: kinds of holes, drawn "
        "equally often, a kind named twice twice as often, or a picture, black in the hole (%(default)s)")
    add("--factor", type=cli.number(float, 1), default=4.0, help="of enhance: how much smaller x is (4)")
    add("--noise", type=cli.nonnegative, default=0.05, help="of enhance: standard deviation of the noise in x, of "
        "pictures in [-1, 1] (0.05)")
    add("--l1", type=cli.nonnegative, metavar="LAMBDA", help="lambda, the weight of L1 (100; complete: 25, on the hole)")
    add("--warm-up", type=cli.number(int, 0), metavar="N", help="steps with L1 alone before D begins (0; "
        "complete: 1000)")
    add("--depth", type=cli.number(int, 0), default=0, help="halvings in the U-Net; 0: down to one pixel (0)")
    add("--dropout", type=cli.fraction, default=0.5, help="in the inner levels of the U-Net (0.5)")
    add("--n-layers", type=cli.number(int, 0, 7), default=0, help="halvings in D: 1, 2 or 3 make it judge patches "
        "of 16, 34 or 70 pixels; 0: what suits the size (0)")
    add("--overfit-check", action="store_true", help="train on eight pairs for 300 steps, say whether the network can "
        "learn them, and end")
    data.add_arguments(parser)
    cli.add_arguments(parser, without=("--latent", "--augment"))
    parser.set_defaults(batch=4, lr=2e-4, norm="instance")                   # Isola et al. 2017, appendix 6.2
    args = cli.parse_arguments(
        parser, argv, lambda args: {**TASKS[args.task], **(DEMO if args.data == "demo" else {})})
    if args.task == "pairs" and args.data == "demo":
        parser.error("--task pairs needs pairs, and the demo has single pictures: give a folder, as in --data ./maps")
    if args.evaluate_every:
        parser.error("--evaluate-every draws pictures from z, and pix2pix has no z: its log has PSNR and L1 on "
                     "held-out pictures, every --sample-every steps")
    return args


def sheet(*columns):
    """Pictures (N, C, H, W) side by side, x | G(x) | y, as one tensor for `data.save_grid`.

    All are grey, or all are made colour; a mask in the last channel is left away.
    """
    columns = [t[:, :3] if t.shape[1] >= 3 else t[:, :1] for t in columns]
    channels = max(t.shape[1] for t in columns)
    return torch.stack([t.expand(-1, channels, -1, -1) for t in columns], 1).flatten(0, 1)


def overfit_check(G, args, x, y, m, amp):
    """L1 on eight pairs, 300 steps: whether G learns them by heart, to under a third of what `trivial` gives."""
    opt_G = torch.optim.Adam(G.parameters(), args.lr, (0.5, 0.999))
    for step in range(1, 301):
        with amp:
            loss = gan.l1_loss(y, G(x), m)
        opt_G.zero_grad()
        loss.backward()
        opt_G.step()
        if step % 50 == 0:
            runtime.print_rank0(f"step {step}/300 | l1 {loss.item():.4f}")
    nothing = gan.l1_loss(y, pairs.trivial(x, y, m), m).item()
    learned = loss.item() < nothing / 3
    runtime.print_rank0(f"overfit check: {'passed' if learned else 'FAILED'}; L1 {loss.item():.4f} on {len(x)} pairs after 300 "
                f"steps, {nothing:.4f} without any learning" + ("" if learned else "; the pairs contradict one "
                "another, or --features, --depth or --lr are too small"))
    raise SystemExit(0 if learned else 1)


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("train_pix2pix.py"):
        size = decode.parse_size(args.size)
        gan.grid_sizes(size)                                                     # a mistake is said before reading
        n_layers = args.n_layers or (1 if min(size) < 48 else 2 if min(size) < 128 else 3)
        for flag, value, most in (("--depth", args.depth, min(size).bit_length() - 1),
                                  ("--n-layers", n_layers, (min(size) // 3).bit_length() - 1)):
            if value > most or (flag, value) == ("--depth", 1):
                raise ValueError(f"{flag} {value}: at --size {args.size} it can be {'2' if flag == '--depth' else '1'} "
                                 f"to {most}")
        run = runs.Run(args, "train_pix2pix.py", images_per_step=args.batch)
        (pictures, channels_x), (unseen, _) = (
            pairs.load_pairs(args, part, least) if args.task == "pairs" else (data.load_from_args(args, part, least), 0)
            for part, least in (("train", 2), ("heldout", 0)))
        runtime.print_rank0("\n".join(data.describe(args.data, pictures)))
        if not len(unseen.images):
            runtime.print_rank0("data: no picture is held out, so what is called held-out is measured on training pictures")
        make_pairs = pairs.Pairs(args, size, pictures.images.shape[1], channels_x)
        first = make_pairs(next(data.batches(pictures.images, min(64, len(pictures.images)), args.seed)), 0)
        pairs.preflight(*first, args.data)

        norm = "none" if args.norm == "spectral" else args.norm
        G = gan.UNet(size, make_pairs.channels_x, make_pairs.channels_y, args.features, args.max_features, args.depth,
                     args.dropout, norm, args.upsample)
        D = gan.PatchGAN(make_pairs.channels_x + make_pairs.channels_y, args.features, args.max_features, n_layers,
                         args.norm)
        G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
        if args.overfit_check:
            overfit_check(G, args, *(t if t is None else t[:8].to(run.device) for t in first), run.amp)
        G_ema = copy.deepcopy(G).eval().requires_grad_(False)
        fused = run.device.type != "mps"
        opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, (0.5, 0.999), fused=fused) for net in (G, D))
        state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
        run.resume(state, pictures=pictures.fingerprint)

    images = data.batches(pictures.images, args.batch, args.seed, run.step, args.flip, run.device,
                          (run.rank, run.world_size))
    unseen = unseen.images if len(unseen.images) else pictures.images
    shown = next(data.batches(unseen, min(256, len(unseen)), args.seed))
    shown = [t if t is None else t.to(run.device) for t in make_pairs(shown, 0)]
    columns, rows = (12, 8) if size[1] <= 128 else (6, 6)                    # of a sheet: 32 or 12 examples
    x, y, m = (t if t is None else t[:16] for t in first)
    apart = (y - pairs.trivial(x, y, m)).abs() - 1
    run.write("pairs.png", plots.save_grid, sheet(x, y, apart)[:columns * rows], columns)
    psnr_trivial = metrics.masked_psnr(shown[1], pairs.trivial(*shown), shown[2]).mean()
    amp = run.amp

    def generate(G, x, y, m):
        out = G(x)
        return out if m is None else inpainting.composite(y, out, m)                # D sees what was known as it was

    def discriminator_step(x, y, fake):
        with amp:
            f_real, f_fake = D(torch.cat([x, y], 1)), D(torch.cat([x, fake], 1))
            # maximise log D(x, y) + log(1 - D(x, G(x))); halved, which slows D down: section 3.3
            loss = gan.bce_discriminator_loss(f_real, f_fake) / 2
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        return dict(loss_D=loss.detach(), D_x=f_real.detach().sigmoid().mean(), D_G_z=f_fake.detach().sigmoid().mean())

    def generator_step(x, y, m, fake, adversarial):
        with amp:
            l1 = gan.l1_loss(y, fake, m)                                     # L_L1(G), eq. 3
            game = gan.bce_generator_loss(D(torch.cat([x, fake], 1))) if adversarial else 0 * l1
        opt_G.zero_grad()
        (game + args.l1 * l1).backward(inputs=list(G.parameters()))          # eq. 4; no gradients for D's weights
        opt_G.step()
        return dict(loss_G=game.detach(), l1=l1.detach()) if adversarial else dict(l1=l1.detach())

    shared = "the steps of D and G share one pass of G"
    discriminator_step, generator_step = run.capture(discriminator_step, shared), run.capture(generator_step, shared)
    for step in run.steps():
        x, y, m = make_pairs(next(images), step)                                  # x, y ~ p_data
        with amp:
            fake = generate(G, x, y, m)                                      # G(x)
        scores, adversarial = {}, step > args.warm_up
        if adversarial:
            scores = discriminator_step(x, y, fake.detach())                 # one gradient descent step on D,
        scores.update(generator_step(x, y, m, fake, adversarial))            # then one step on G: section 3.3
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            x, y, m = shown
            out = torch.cat([generate(G_ema, *(t if t is None else t[k:k + args.batch] for t in shown))
                             for k in range(0, len(x), args.batch)])
            run.log_once(psnr_heldout=metrics.masked_psnr(y, out, m).mean(), psnr_trivial=psnr_trivial,
                       l1_heldout=gan.l1_loss(y, out, m))
            run.write(f"samples/step-{step:07d}.png", plots.save_grid, sheet(x, out, y)[:columns * rows], columns)
        run.log(**scores)
        if run.due(args.save_every):
            run.save(state, config=G.config, network="UNet")
            run.write(f"generators/step-{step:07d}.pt", lambda path: torch.save(gan.generator_state(G_ema), path))
            run.write("losses.png", plots.save_curves, run.history(), PANELS)
        if run.due(args.steps):                                              # on the last step only: it takes a while
            run.write("progress.gif", plots.save_gif, run.folder / "samples")
    if args.data == "demo":
        runtime.print_rank0("your own pictures:\n    python train_pix2pix.py --data YOUR_FOLDER --size 64 --task complete")


if __name__ == "__main__":
    main()
