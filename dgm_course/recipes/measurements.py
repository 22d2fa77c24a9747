"""How the shipped tables are measured: what varies, and either what is trained for each row or which checkpoint is looked at."""

from dgm_course.recipes.networks import GAN_FIT

__all__ = ["MEASUREMENTS"]

GUIDANCE = {
    name: [{"name": name, "scale": scale} for scale in scales]
    for name, scales in {
        "classifier-free": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
        "interval": [2.0, 3.0, 5.0, 8.0],
        "classifier": [0.5, 1.0, 2.0, 4.0, 8.0],
    }.items()
}

MEASUREMENTS = {
    "fashion-guidance": {
        "what": "the weight of classifier-free guidance, at all t and in an interval, with the network of fashion-unet",
        "data": "fashion_mnist",
        "checkpoint": "fashion-unet",
        "path": {"class": "Cosine"},
        "sampler": {"name": "DDIM", "grid": "time", "evaluations": 12},
        "vary": {"seed": [0, 1], "guidance": GUIDANCE["classifier-free"] + GUIDANCE["interval"]},
        "scored with": {"classifier": "fashion-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-backbones": {
        "what": "U-Net with and without its skip, and the DiT block in its three variants: equal parameters, steps and data, over seeds",
        "data": "mnist",
        "vary": {
            "kind": ["U-Net", "U-Net without skip", "DiT, adaLN-Zero", "DiT, cross-attention", "DiT, in-context"],
            "seed": [0, 1, 2],
        },
        "kinds": {
            "U-Net": {"net": {"class": "UNet", "channels": [32, 48], "blocks": [2, 2], "num_classes": 10}},
            "U-Net without skip": {
                "net": {"class": "UNet", "channels": [32, 48], "blocks": [2, 2], "num_classes": 10, "skip": False}
            },
            "DiT, adaLN-Zero": {"net": {"class": "DiT", "width": 68, "depth": 3, "num_classes": 10}},
            "DiT, cross-attention": {
                "net": {
                    "class": "DiT",
                    "width": 72,
                    "depth": 3,
                    "num_classes": 10,
                    "conditioning": "cross-attention",
                }
            },
            "DiT, in-context": {
                "net": {"class": "DiT", "width": 84, "depth": 3, "num_classes": 10, "conditioning": "in-context"}
            },
        },
        "path": {"class": "Cosine"},
        "predicts": "v",
        "times": "logit-normal",
        "steps": 600,
        "batch": 128,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "steps": 25, "draws": 1},
    },
    "mnist-collapse": {
        "what": "a VAE with its KL weighted by β and the variance of its pixels held fixed: latents collapse",
        "data": "mnist",
        "model": {"class": "ConvVAE"},
        "vary": {"beta": [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]},
        "steps": 800,
        "batch": 128,
        "seed": 0,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-distillation": {
        "what": "students of mnist-unet beside its own samplers, against how often a network is asked, over seeds",
        "data": "mnist",
        "checkpoint": "mnist-unet",
        "path": {"class": "Cosine"},
        "vary": {
            "seed": [0, 1],
            "sampler": [{"name": "DDIM", "grid": "time", "evaluations": n} for n in (1, 2, 4, 8, 16, 32, 64)]
            + [{"name": "DPM-Solver++(2M)", "grid": "time", "evaluations": n} for n in (2, 4, 8, 16)]
            + [
                {"name": name, "grid": grid, "evaluations": 4}
                for name, grid in (
                    ("DDPM, β", "time"),
                    ("DDPM, β̃", "time"),
                    ("Heun", "time"),
                    ("DPM-Solver++(2S)", "time"),
                    ("DPM-Solver++(2M)", "log-SNR"),
                )
            ]
            + [
                {"name": "DDIM", "grid": "time", "evaluations": n, "checkpoint": f"mnist-student-{n}"}
                for n in (8, 4, 2, 1)
            ]
            + [
                {"name": "consistency", "grid": "time", "evaluations": n, "checkpoint": "mnist-consistency"}
                for n in (1, 2, 4)
            ],
        },
        "scored with": {"classifier": "mnist-classifier", "samples": 2000, "draws": 1, "spread": True},
    },
    "mnist-fast": {
        "what": "samplers with few evaluations, on the cosine path with the network of mnist-unet, over seeds",
        "data": "mnist",
        "checkpoint": "mnist-unet",
        "path": {"class": "Cosine"},
        "vary": {
            "seed": [0, 1],
            "sampler": [
                {"name": name, "grid": grid, "evaluations": evaluations}
                for evaluations in (2, 4, 6, 10, 20)
                for name, grid in (
                    ("DDPM, β", "time"),
                    ("DDPM, β̃", "time"),
                    ("DDIM", "time"),
                    ("Heun", "time"),
                    ("DPM-Solver++(2S)", "time"),
                    ("DPM-Solver++(2M)", "time"),
                    ("DPM-Solver++(2M)", "log-SNR"),
                )
            ]
            + [
                {"name": name, "grid": "time", "evaluations": evaluations}
                for evaluations in (50, 100)
                for name in ("DDPM, β", "DDPM, β̃", "DDIM")
            ],
        },
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-generators": {
        "what": "VAE, GAN and diffusion of about equal size, trained for about equal times, over seeds",
        "data": "mnist",
        "vary": {"kind": ["VAE", "GAN", "diffusion", "GAN, plain Adam"], "seed": [0, 1, 2, 3]},
        "kinds": {
            "VAE": {"model": {"class": "ConvVAE"}, "steps": 2000},
            "GAN": {"model": {"class": "ConvGAN"}, "fit": GAN_FIT | {"precision": "float32", "ema": 0.99}},
            "diffusion": {
                "net": {"class": "UNet", "channels": [24, 48], "blocks": [2, 2], "num_classes": 0},
                "path": {"class": "Cosine"},
                "predicts": "v",
                "times": "logit-normal",
                "steps": 700,
            },
            "GAN, plain Adam": {"model": {"class": "ConvGAN"}},  # with the settings that serve the other two
        },
        "steps": 1000,
        "batch": 128,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-guidance": {
        "what": "the weight of guidance: classifier-free, in an interval of t, and by a classifier, with the network of mnist-unet",
        "data": "mnist",
        "checkpoint": "mnist-unet",
        "classifier": "mnist-noisy-classifier",
        "path": {"class": "Cosine"},
        "sampler": {"name": "DDIM", "grid": "time", "evaluations": 12},
        "vary": {"seed": [0, 1], "guidance": sum(GUIDANCE.values(), [])},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-guided-students": {
        "what": "the weight of guidance w, mnist-unet guided with 1 + w beside the students that are told w, over seeds",
        "data": "mnist",
        "checkpoint": "mnist-unet",
        "path": {"class": "Cosine"},
        "vary": {
            "seed": [0, 1],
            "w": [0.0, 1.0, 2.0, 4.0],
            "sampler": [
                {"name": "DDIM", "grid": "time", "evaluations": 16},
                {"name": "DDIM", "grid": "time", "evaluations": 16, "checkpoint": "mnist-guided"},
            ]
            + [
                {"name": name, "grid": "time", "evaluations": evaluations, "checkpoint": f"mnist-guided-{n}"}
                for n in (8, 4, 2)
                for name, evaluations in (("DDIM", n), ("stochastic", 2 * n - 1))
            ],
        },
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1, "spread": True},
    },
    "mnist-predictions": {
        "what": "noise, clean image or v predicted by the same network with the same data and budget, over seeds",
        "data": "mnist",
        "net": {"class": "UNet", "channels": [16, 32], "blocks": [2, 2], "num_classes": 10},
        "path": {"class": "VP"},
        "vary": {"predicts": ["eps", "x0", "v"], "seed": [0, 1, 2, 3, 4]},
        "steps": 600,
        "batch": 128,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "steps": 50, "draws": 1},
    },
    "mnist-resolutions": {
        "what": "digits at three resolutions, each with the log-SNR of the cosine path moved by five amounts, over seeds",
        "data": "mnist",
        "vary": {
            "kind": ["14 px", "28 px", "56 px"],
            "path": [{"class": "Cosine", "shift": shift} for shift in (-6.0, -4.0, -2.0, 0.0, 2.0)],
            "seed": [0, 1, 2],
        },
        "kinds": {  # the images are folded, so that each network works at 14×14 and costs the same
            f"{14 * fold} px": {
                "size": 14 * fold,
                "net": {"class": "UNet", "channels": [16, 32], "blocks": [2, 2], "num_classes": 10, "fold": fold},
            }
            for fold in (1, 2, 4)
        },
        "predicts": "v",
        "steps": 400,
        "batch": 128,
        "fit": {"precision": "float32", "ema": 0.99},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "steps": 25, "draws": 1},
    },
    "mnist-sde": {
        "what": "samplers of the reverse SDE and of its ODE, on the VP path with the network of mnist-unet, over seeds",
        "data": "mnist",
        "checkpoint": "mnist-unet",
        "path": {"class": "VP"},
        "vary": {
            "seed": [0, 1],
            "sampler": [
                {"name": name, "evaluations": evaluations}
                for evaluations in (10, 20, 50, 100, 200)
                for name in ("Euler–Maruyama", "ancestral", "predictor–corrector", "corrector–predictor", "Heun")
            ]
            + [{"name": "dopri5", "tolerance": tolerance} for tolerance in (1e-1, 1e-2, 1e-3, 1e-4)],
        },
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
    "mnist-users": {
        "what": "a model for each user: mnist-dit fine-tuned on ten images of each label, in full or by few parameters, over seeds",
        "data": "mnist",
        "checkpoint": "mnist-dit",
        "null": 10,
        "vary": {
            "seed": [0, 1],
            "user": ["bold", "thin", "shoe", "clothes"],
            "kind": [
                "base",
                "full",
                "LoRA, r = 1",
                "LoRA, r = 2",
                "LoRA, r = 4",
                "LoRA, r = 8",
                "LoRA on attention, r = 4",
                "Houlsby",
                "Pfeiffer",
                "prefix",
                "biases",
            ],
        },
        "kinds": {
            "base": {"tunes": {"kind": "base"}},
            "full": {"tunes": {"kind": "full"}},
            "Houlsby": {"tunes": {"kind": "adapters", "bottleneck": 8, "placement": "Houlsby"}},
            "Pfeiffer": {"tunes": {"kind": "adapters", "bottleneck": 16, "placement": "Pfeiffer"}},
            "prefix": {"tunes": {"kind": "prefix", "length": 16, "hidden": 128}},
            "biases": {"tunes": {"kind": "biases"}},
        }
        | {
            f"LoRA{place}, r = {r}": {"tunes": {"kind": "LoRA", "targets": targets, "rank": r, "alpha": 4.0}}
            for place, targets, ranks in (
                ("", ["perceptron.0", "perceptron.2", "modulation"], (1, 2, 4, 8)),
                (" on attention", ["query", "key", "value", "attention.out"], (4,)),
            )
            for r in ranks
        },
        "keeps": "LoRA, r = 2",
        "images for a user": 100,
        "times": "logit-normal",
        "steps": 400,
        "batch": 32,
        "fit": {"warmup": 20, "ema": 0.98, "weight_decay": 0.0, "precision": "float32"},
        "rates": {
            "full": {"lr": 1e-3},
            "LoRA": {"lr": 1e-2},
            "adapters": {"lr": 2e-2},
            "prefix": {"lr": 1e-2},
            "biases": {"lr": 3e-2},
        },
        "judges": {"mnist": "mnist-classifier", "fashion_mnist": "fashion-classifier"},
        "scored with": {"samples": 500, "draws": 1, "steps": 16},
    },
    "mnist-variances": {
        "what": "ancestral sampling with few steps, and its bound: the variance fixed at β or β̃, or as learned by mnist-improved",
        "data": "mnist",
        "checkpoint": "mnist-improved",
        "path": {"class": "Cosine"},
        "images for bits": 100,
        "vary": {"seed": [0], "steps": [10, 25, 50, 100], "variance": ["beta", "posterior", "learned"]},
        "scored with": {"classifier": "mnist-classifier", "samples": 1000, "draws": 1},
    },
}
