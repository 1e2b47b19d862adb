"""Train a WGAN-GP, a WGAN-LP or a WGAN with weight clipping on any folder of images.

    python train_wgan.py                                    the built-in demo, some minutes on a CPU
    python train_wgan.py --data ./teeth --size 256          your own folder
    python train_wgan.py --data ./teeth --constraint clip   Arjovsky et al. 2017 instead of Gulrajani et al. 2017
    python train_wgan.py --resume runs/wgan-teeth-1         go on after Ctrl-C as if it had never stopped
    python train_wgan.py @runs/wgan-teeth-1/args.txt        the same run once more

The loop is Algorithm 1 of the two papers. The numbers behind the lines are the lines of the algorithm: first those of
Gulrajani et al. 2017 (arXiv 1704.00028), after the bar those of Arjovsky et al. 2017 (arXiv 1701.07875). Deviation:
samples come from the averaged G in eval mode.
"""

import copy
import functools

import torch

import cli
import data
import decode
import gan
import metrics
import plots
import runs
import runtime

# What follows from the constraint: the optimizer's and the critic's settings of each paper.
PAPER = {
    "gp": dict(lr=1e-4, norm="layer"),                      # Gulrajani et al. 2017: Adam; LayerNorm, section 4
    "lp": dict(lr=1e-4, norm="layer"),                      # Petzka et al. 2018, with the settings of gp
    "clip": dict(lr=5e-5, norm="batch"),                    # Arjovsky et al. 2017: RMSProp, DCGAN's critic
}
# The demo: separate teeth within three minutes on two cores. A short run, so a higher learning rate.
DEMO = dict(size="32", features=32, n_critic=3, steps=1000, log_every=25, sample_every=50, save_every=300)
DEMO_LR = {"gp": 8e-4, "lp": 8e-4, "clip": 2e-4}
# The charts of losses.png: title and names of the numbers.
PANELS = [("losses (both are minimised)", ("loss_D", "loss_G")),
          ("E[D(x)] - E[D(x~)], the estimate of the Wasserstein distance", ("wasserstein",)),
          ("gradient penalty, without lambda", ("penalty",)), *plots.QUALITY_PANELS]


def parse_arguments(argv=None):
    parser = cli.Parser("train_wgan.py", __doc__, {
        **{f"--constraint {name}": defaults for name, defaults in PAPER.items()}, "--data demo": DEMO,
        **{f"--data demo --constraint {name}": {"lr": lr} for name, lr in DEMO_LR.items()}})
    add = parser.add_argument_group("the method").add_argument
    add("--constraint", default="gp", choices=PAPER, help="on D's gradient: gp, penalty, Adam (Gulrajani et al. 2017); "
        "lp, one-sided (Petzka et al. 2018); clip, weight clipping, RMSProp (Arjovsky et al. 2017) (default: gp)")
    add("--lam", type=cli.nonnegative, default=10.0, help="lambda, the weight of the gradient penalty (default: 10, "
        "Gulrajani et al. 2017)")
    add("--clip", type=cli.number(float, 1e-9), default=0.01, help="c, the bound on D's weights with --constraint clip "
        "(default: 0.01, Arjovsky et al. 2017)")
    add("--n-critic", type=cli.positive_int, default=5, help="updates of D for one of G (default: 5, both papers)")
    data.add_arguments(parser)
    cli.add_arguments(parser)
    return cli.parse_arguments(parser, argv, lambda args: {
        **PAPER[args.constraint], **({**DEMO, "lr": DEMO_LR[args.constraint]} if args.data == "demo" else {})}, check)


def check(args):
    """Raises ValueError, one sentence, for flags that cannot be or do not go together."""
    gan.grid_sizes(decode.parse_size(args.size))
    gan.diff_augment(torch.zeros(0, 1, 8, 8), args.augment)
    if (args.norm == "batch" or args.minibatch_discrimination) and args.constraint != "clip":
        raise ValueError("--norm batch and --minibatch-discrimination do not go with a gradient penalty, which is on "
                         "the gradient at each image: D's score of one image would depend on the others; take --norm "
                         "none, layer, instance or spectral, or --constraint clip")


@runtime.exit_on_user_error("train_wgan.py")
def main(argv=None):
    args = parse_arguments(argv)
    run = runs.Run(args, "train_wgan.py", images_per_step=args.batch * args.n_critic)
    with runtime.rank0_first():
        dataset = data.load_from_args(args, "train", at_least=2)
    runtime.print_rank0(data.describe(args.data, dataset, run.images_per_step))

    channels, *size = dataset.images.shape[1:]
    G = gan.Generator(size, channels, args.latent, args.features, args.max_features, args.upsample)
    D = gan.Discriminator(size, channels, args.features, args.max_features, args.norm, args.minibatch_discrimination)
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
    runtime.print_rank0(f"G: {runtime.layer_shapes(G, args.latent)}\nD: {runtime.layer_shapes(D, channels, *size)}")
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    clip = args.constraint == "clip"
    adam = dict(betas=(0.0, 0.9), fused=run.device.type != "mps")
    opt_G, opt_D = (torch.optim.RMSprop(net.parameters(), args.lr) if clip else
                    torch.optim.Adam(net.parameters(), args.lr, **adam) for net in (G, D))
    state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    if args.evaluate_every:
        import evaluate
        report_quality = evaluate.make_evaluator(args, run, dataset.images)
    run.resume(state, images=dataset.fingerprint)

    images = data.batches(dataset.images, args.batch, args.seed, run.step * args.n_critic, args.flip, run.device,
                          (run.rank, run.world_size))
    fixed_z = torch.randn(64, args.latent, generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    real_batch = next(data.batches(dataset.images, min(64, len(dataset.images)), args.seed))
    run.write("real.png", plots.save_grid, real_batch)
    noise = functools.partial(torch.randn, args.batch, args.latent, device=run.device)
    augment = functools.partial(gan.diff_augment, policy=args.augment)

    def scores(real, fake):
        if args.norm == "batch" or args.minibatch_discrimination:            # couples the images of a pass
            return D(real), D(fake)
        return D(torch.cat([real, fake])).chunk(2)                           # the same in one pass, which is faster

    def discriminator_step(real):                                            #  4 |  3  x ~ P_r
        z = noise()                                                          #  4 |  4  z ~ p(z)
        with run.amp:
            with torch.no_grad():                                            #          G is not trained here: no graph
                fake = G(z)                                                  #  5 |     x~ <- G(z)
            real, fake = augment(real), augment(fake)
            loss = gan.critic_loss(*scores(real, fake))                      #  7 |  5  D(x~) - D(x)
            wasserstein = -loss.detach()
            if not clip:
                penalty = gan.gradient_penalty(D, real, fake, one_sided=args.constraint == "lp")
                loss = loss + args.lam * penalty                             #  6, 7    + lambda (||grad D(x^)|| - 1)^2
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()                                                         #  9 |  6  w <- Adam | RMSProp
        if clip:
            gan.clip_weights(D, args.clip)                                   #    |  7  w <- clip(w, -c, c)
        return dict(loss_D=loss.detach(), wasserstein=wasserstein, **{} if clip else {"penalty": penalty.detach()})

    def generator_step():
        z = noise()                                                          # 11 |  9  z ~ p(z)
        with run.amp:
            loss = gan.generator_loss(D(augment(G(z))))                      # 12 | 10  -D(G(z))
        opt_G.zero_grad()
        loss.backward(inputs=list(G.parameters()))                           #          no gradients for D's weights
        opt_G.step()                                                         # 12 | 11  theta <- Adam | RMSProp
        return dict(loss_G=loss.detach())

    discriminator_step, generator_step = run.capture(discriminator_step), run.capture(generator_step)
    for step in run.steps():                                                 #  1 |  1  while theta has not converged
        for _ in range(args.n_critic):                                       #  2 |  2  for t = 1, ..., n_critic
            scalars = discriminator_step(next(images))
        scalars |= generator_step()
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            samples = torch.cat([G_ema(z) for z in fixed_z.split(args.batch)])
            run.log_once(diversity_fake=metrics.diversity(samples), diversity_real=metrics.diversity(real_batch))
            run.write(f"samples/step-{step:07d}.png", plots.save_grid, samples)
        if run.due(args.evaluate_every):
            report_quality(G_ema, step)
        run.log(**scalars)
        if run.due(args.save_every):
            run.save(state, config=G.config)
            run.write(f"generators/step-{step:07d}.pt", gan.save_generator, G_ema)
            run.write("losses.png", plots.save_curves, runs.read_log(run.folder), PANELS)
    run.write("progress.gif", plots.save_gif, run.folder / "samples")


if __name__ == "__main__":
    main()
