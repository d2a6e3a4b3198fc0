"""Draw an image from a prompt, with the VAE, UNet and CLIP of segmentation: a check of port and weights.

    python -m lab.draw "a photograph of a horse"                       # weights/sd15, 512x512, 50 steps
    python -m lab.draw "a harbour at night" --size 512 768 --seed 7

The sampler is DDIM without added noise (Song et al. 2021, Eq. 12) with classifier-free guidance (Ho &
Salimans 2022), equal to diffusers' `DDIMScheduler` with the settings of Stable Diffusion v1.5
(tests/test_lab_draw.py).
"""

from errors import Parser, end_quietly, run_command

if __name__ == "__main__":
    end_quietly()  # at Ctrl-C during the imports below

import argparse
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from assemble import prior
from unet import TIMES, UNet, alphas_cumprod

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def ddim_times(steps: int) -> list[int]:
    """Return the time steps, noisiest first; the last is t = 1 (`steps_offset` of v1.5 in diffusers)."""
    assert 1 <= steps < TIMES, f"need 1 to {TIMES - 1} steps, got {steps}"
    return [1 + i * (TIMES // steps) for i in reversed(range(steps))]


@torch.no_grad()
def sample(
    unet: UNet, noise: Tensor, context: Tensor, empty: Tensor, times: Collection[int], guidance: float
) -> Tensor:
    """Denoise `noise` into a latent, both `(B, 4, h, w)`.

    `context` `(B, L, 768)` is the encoded prompt, `empty` `(B, L, 768)` the prompt ""; `guidance` 1 is none,
    more extrapolates away from `empty`. `times` are equally spaced and falling (`ddim_times`).
    """
    alphas = alphas_cumprod().to(noise.device)
    stride = TIMES // len(times)
    latent = noise
    for t in times:
        both = torch.cat([latent, latent])
        eps = unet(both, torch.full((len(both),), t, device=noise.device), torch.cat([empty, context]))
        eps_empty, eps_context = eps.float().chunk(2)
        eps = eps_empty + guidance * (eps_context - eps_empty)

        now, then = alphas[t], alphas[max(t - stride, 0)]
        clean = (latent.float() - (1 - now).sqrt() * eps) / now.sqrt()  # Eq. 1 solved for x
        latent = (then.sqrt() * clean + (1 - then).sqrt() * eps).to(noise.dtype)
    return latent


def draw(
    prompt: str, model: str, weights: str, *, size: tuple[int, int], seed: int, steps: int, guidance: float
) -> Image.Image:
    """Draw a prompt; `size` is (height, width). The same seed gives the same noise on every device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    vae, unet, clip, tokenizer = prior(model, weights)
    vae, unet, clip = (part.to(device, dtype).eval() for part in (vae, unet, clip))
    H, W = size
    noise = torch.randn(1, 4, H // 8, W // 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        context, empty = clip.text(tokenizer([prompt, ""]).to(device))[0].split(1)
        times = tqdm(ddim_times(steps), desc=f"drawing on {device.type}", disable=None)
        latent = sample(unet, noise.to(device, dtype), context, empty, times, guidance)
        image = vae.decode(latent)[0].float().clamp(-1, 1)  # (3, H, W)
    levels = ((image + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lab.draw",
        description="Draw an image from a prompt with Stable Diffusion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", help="what to draw")
    image = parser.add_argument_group("the image")
    image.add_argument("--out", default="drawing.png", help="output file")
    size = "height and width, multiples of 64 (default: 512, tiny: 128)"
    image.add_argument("--size", type=int, nargs="+", metavar="N", default=argparse.SUPPRESS, help=size)
    image.add_argument("--seed", type=int, default=42, help="of the initial noise")
    image.add_argument("--steps", type=int, default=50, help="DDIM steps, two UNet passes each")
    scale = "of classifier-free guidance; 1 is none"
    image.add_argument("--guidance", type=float, default=7.5, help=scale)
    model = parser.add_argument_group("the model")
    model.add_argument("--model", choices=["sd15", "tiny"], default="sd15", help="its size")
    weights = "its folder, or `random` (default: weights/MODEL)"
    model.add_argument("--weights", metavar="DIR", default=argparse.SUPPRESS, help=weights)
    options = parser.parse_args(argv)
    options.weights = getattr(options, "weights", f"weights/{options.model}")
    options.size = getattr(options, "size", [512 if options.model == "sd15" else 128])
    if Path(options.out).suffix.lower() not in FORMATS:
        parser.error(f"--out {options.out}: the name must end with one of {' '.join(FORMATS)}")
    if len(options.size) > 2 or any(x < 64 or x % 64 for x in options.size):
        parser.error(f"--size {' '.join(map(str, options.size))}: need one or two multiples of 64")
    if not 1 <= options.steps < TIMES:
        parser.error(f"--steps {options.steps}: need 1 to {TIMES - 1}")
    if options.weights == "random":
        print("random weights: the image will be noise for every prompt")

    def work() -> None:
        start = time.time()
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        how = {"size": (options.size[0], options.size[-1]), "seed": options.seed, "steps": options.steps}
        drawing = draw(options.prompt, options.model, options.weights, guidance=options.guidance, **how)
        drawing.save(options.out)
        print(f"{options.out}: {options.steps} steps, seed {options.seed}, {time.time() - start:.0f} s")

    return run_command("lab.draw", work, "interrupted: no image was written")


if __name__ == "__main__":
    sys.exit(main())
