"""Train a WGAN-GP, a WGAN-LP or a WGAN with weight clipping on any folder of pictures.

    python train_wgan.py                                    the built-in demo, some minutes on a CPU
    python train_wgan.py --data ./teeth --size 256          your own folder
    python train_wgan.py --data ./teeth --constraint clip   Arjovsky et al. 2017 instead of Gulrajani et al. 2017
    python train_wgan.py --resume runs/wgan-teeth-1         go on after Ctrl-C, to the last bit what it would have been
    python train_wgan.py @runs/wgan-teeth-1/args.txt        the same run once more

The loop is Algorithm 1 of the two papers. The numbers behind the lines are the lines of the algorithm: first those of
Gulrajani et al. 2017 (arXiv 1704.00028), after the bar those of Arjovsky et al. 2017 (arXiv 1701.07875).
"""

import copy

import torch

import data
import gan
import metrics
import plots
import runtime

# What follows from the constraint: the optimizer's and the critic's settings of each paper.
PAPER = {
    "gp": dict(lr=1e-4, norm="layer"),                      # Gulrajani et al. 2017: Adam; LayerNorm, section 4
    "lp": dict(lr=1e-4, norm="layer"),                      # Petzka et al. 2018, with the settings of gp
    "clip": dict(lr=5e-5, norm="batch"),                    # Arjovsky et al. 2017: RMSProp, DCGAN's critic
}


# What suits the demo: separate teeth within three minutes on two cores. So short a run bears a larger learning rate.
DEMO = dict(size="32", features=32, n_critic=3, steps=1000, log_every=25, sample_every=50, save_every=300)
DEMO_LR = {"gp": 8e-4, "lp": 8e-4, "clip": 2e-4}


# The charts of losses.png: title and numbers of the log.
PANELS = [("losses (both are minimised)", ("loss_D", "loss_G")),
          ("E[D(x)] - E[D(x~)], the estimate of the Wasserstein distance", ("wasserstein",)),
          ("gradient penalty, without lambda", ("penalty",)),
          ("spread: how far two pictures lie apart", ("spread_fake", "spread_real")),
          ("FID of the averaged G, at --evaluate-n pictures", ("fid",)), ("KID of the same", ("kid",))]


def parse_arguments(argv=None):
    parser = runtime.Parser("train_wgan.py", __doc__, {
        **{f"--constraint {name}": defaults for name, defaults in PAPER.items()}, "--data demo": DEMO,
        **{f"--data demo --constraint {name}": {"lr": lr} for name, lr in DEMO_LR.items()}})
    add = parser.add_argument_group("the method").add_argument
    add("--constraint", default="gp", choices=PAPER, help="on D's slope: gp, gradient penalty with Adam (Gulrajani et "
        "al. 2017); lp, one-sided penalty (Petzka et al. 2018); clip, weights clipped, with RMSProp (Arjovsky et al. "
        "2017) (gp)")
    add("--lam", type=runtime.nonnegative, default=10.0, help="lambda, the weight of the penalty (10, Gulrajani et "
        "al. 2017)")
    add("--clip", type=runtime.number(float, 1e-9), default=0.01, help="c, the bound on D's weights (0.01, Arjovsky "
        "et al. 2017)")
    add("--accumulate", type=runtime.positive_int, default=1, metavar="K", help="work a batch out in K parts, one "
        "after the other: the same step in less memory; with --norm spectral nearly the same (1)")
    add("--n-critic", type=runtime.positive_int, default=5, help="updates of D for one of G (5 in both papers)")
    data.add_arguments(parser)
    runtime.add_arguments(parser)
    args = runtime.parse_arguments(parser, argv, lambda args: {
        **PAPER[args.constraint], **({**DEMO, "lr": DEMO_LR[args.constraint]} if args.data == "demo" else {})})
    if args.batch % args.accumulate:
        parser.error(f"--accumulate {args.accumulate} does not divide --batch {args.batch}")
    if args.norm == "batch" and args.accumulate > 1:
        parser.error("--norm batch does not go with --accumulate: its averages would be those of a part; take none, "
                     "layer, instance or spectral")
    if args.norm == "batch" and args.constraint != "clip":
        parser.error("--norm batch does not go with a gradient penalty: the penalty is on the slope at each picture, "
                     "and BatchNorm makes D's score of one picture depend on the others; take none, layer, instance or "
                     "spectral")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("train_wgan.py"):
        size = data.parse_size(args.size)
        gan.grid_sizes(size), gan.diff_augment(torch.zeros(0, 1, 8, 8), args.augment)    # a mistake is said before reading
        run = runtime.Run(args, "train_wgan.py", images_per_step=args.batch * args.n_critic)
        pictures = data.load_from_args(args, "train", at_least=2)
        runtime.print_rank0("\n".join(data.describe(args.data, pictures)))

        channels = pictures.images.shape[1]
        G = gan.Generator(size, channels, args.latent, args.features, args.max_features, args.upsample)
        D = gan.Discriminator(size, channels, args.features, args.max_features, args.norm)
        G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
        G_ema = copy.deepcopy(G).eval().requires_grad_(False)
        if args.constraint == "clip":
            opt_G, opt_D = (torch.optim.RMSprop(net.parameters(), args.lr) for net in (G, D))
        else:
            fused = run.device.type != "mps"
            opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, (0.0, 0.9), fused=fused) for net in (G, D))
        state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
        judge = None
        if args.evaluate_every:
            import evaluate

            judge = evaluate.make_evaluator(args, run, pictures.images)
        run.resume(state, pictures=pictures.fingerprint)

    images = data.batches(pictures.images, args.batch, args.seed, run.step * args.n_critic, args.flip, run.device,
                          (run.rank, run.world_size))
    shown = torch.randn(64, args.latent, generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    real_sheet = next(data.batches(pictures.images, min(64, len(pictures.images)), args.seed))
    run.write("real.png", plots.save_grid, real_sheet)
    amp = run.amp

    def latent():
        return torch.randn(args.batch, args.latent, device=run.device)

    def scores(real, fake):
        if args.norm == "batch":                                             # couples the pictures of a pass
            return D(real), D(fake)
        return D(torch.cat([real, fake])).chunk(2)                           # the same in one pass, which is faster

    def critic_step(reals):                                                  #  4 |  3  x ~ P_r
        z = latent()                                                         #  4 |  4  z ~ p(z)
        with amp, torch.no_grad():                                           #          G is not trained here: no graph
            fakes = G(z)                                                     #  5 |     x~ <- G(z)
        opt_D.zero_grad()
        parts = []
        for real, fake in zip(reals.chunk(args.accumulate), fakes.chunk(args.accumulate)):
            with amp:
                real, fake = (gan.diff_augment(x, args.augment) for x in (real, fake))
                loss = gan.critic_loss(*scores(real, fake))                  #  7 |  5  D(x~) - D(x)
                wasserstein, penalty = -loss.detach(), 0.0
                if args.constraint != "clip":
                    penalty = gan.gradient_penalty(D, real, fake, one_sided=args.constraint == "lp")
                    loss = loss + args.lam * penalty                         #  6, 7    + lambda (||grad D(x^)|| - 1)^2
            (loss / args.accumulate).backward()                              #          the parts' gradients add up
            parts.append((loss, wasserstein, penalty))
        opt_D.step()                                                         #  9 |  6  w <- Adam | RMSProp
        if args.constraint == "clip":
            gan.clip_weights(D, args.clip)                                   #    |  7  w <- clip(w, -c, c)
        with torch.no_grad():
            means = [sum(part) / len(parts) for part in zip(*parts)]
        return dict(zip(("loss_D", "wasserstein", "penalty"), means))

    def generator_step():
        z = latent()                                                         # 11 |  9  z ~ p(z)
        with amp:
            loss = gan.by_parts(lambda fake: gan.generator_loss(D(gan.diff_augment(fake, args.augment))), G(z),
                                args.accumulate)                             # 12 | 10  -D(G(z))
        opt_G.zero_grad()
        loss.backward(inputs=list(G.parameters()))                           #          no gradients for D's weights
        opt_G.step()                                                         # 12 | 11  theta <- Adam | RMSProp
        return loss.detach()

    critic_step, generator_step = run.capture(critic_step), run.capture(generator_step)
    for step in run.steps():                                                 #  1 |  1  while theta has not converged
        for _ in range(args.n_critic):                                       #  2 |  2  for t = 1, ..., n_critic
            numbers = critic_step(next(images))
        loss_G = generator_step()
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            sheet = torch.cat([G_ema(z) for z in shown.split(args.batch)])
            run.log_once(spread_fake=metrics.diversity(sheet), spread_real=metrics.diversity(real_sheet))
            run.write(f"samples/step-{step:07d}.png", plots.save_grid, sheet)
        if judge and run.due(args.evaluate_every):
            judge(G_ema, step)
        run.log(**numbers, loss_G=loss_G)
        if run.due(args.save_every):
            run.save(state, config=G.config)
            run.write(f"generators/step-{step:07d}.pt", lambda path: torch.save(gan.generator_state(G_ema), path))
            run.write("losses.png", plots.save_curves, run.history(), PANELS)
        if run.due(args.steps):                                              # on the last step only: it takes a while
            run.write("progress.gif", plots.save_gif, run.folder / "samples")
    if args.data == "demo":
        runtime.print_rank0("your own pictures:\n    python train_wgan.py --data YOUR_FOLDER --size 64")


if __name__ == "__main__":
    runtime.run_main(main, "train_wgan.py")
