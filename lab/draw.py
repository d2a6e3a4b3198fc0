"""A picture from a prompt, by the same three files that segmentation uses: it tells at a glance that port and
weights are right.

    python -m lab.draw "a photograph of a horse"                       # weights/sd15, 512x512, 50 steps
    python -m lab.draw "a harbour at night" --size 512 768 --seed 7

The sampler is DDIM without added noise (Song et al. 2021, Eq. 12) with classifier-free guidance (Ho &
Salimans 2022), equal to diffusers' `DDIMScheduler` with the settings of Stable Diffusion v1.5
(tests/test_draw.py).
"""

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
from errors import WeightsError
from unet import TIMES, UNet, alphas_cumprod

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def ddim_times(steps: int) -> list[int]:
    """The time steps of a drawing, noisiest first; the last is t = 1 (v1.5's `steps_offset` in diffusers)."""
    assert 1 <= steps < TIMES, f"{steps} steps: give 1 to {TIMES - 1}"
    return [1 + i * (TIMES // steps) for i in reversed(range(steps))]


@torch.no_grad()
def sample(
    unet: UNet, noise: Tensor, context: Tensor, empty: Tensor, times: Collection[int], guidance: float
) -> Tensor:
    """Noise `(B, 4, h, w)` -> latent `(B, 4, h, w)`.

    context `(B, L, 768)` says what to draw, empty `(B, L, 768)` is the prompt ""; guidance 1 follows the
    context as it is, more exaggerates it. `times` are equally spaced, falling (`ddim_times`).
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


def draw(prompt: str, options: argparse.Namespace) -> Image.Image:
    """The picture of a prompt; the same seed gives the same noise on every device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(options.seed)
    vae, unet, clip, tokenizer = prior(options.model, options.weights)
    vae, unet, clip = (part.to(device, dtype).eval() for part in (vae, unet, clip))
    H, W = options.size[0], options.size[-1]
    noise = torch.randn(1, 4, H // 8, W // 8, generator=torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        context, empty = clip.text(tokenizer([prompt, ""]).to(device))[0].split(1)
        times = tqdm(ddim_times(options.steps), desc=f"drawing on {device.type}", disable=None)
        latent = sample(unet, noise.to(device, dtype), context, empty, times, options.guidance)
        image = vae.decode(latent)[0].float().clamp(-1, 1)  # (3, H, W)
    levels = ((image + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.draw",
        description="Draw a picture from a prompt with Stable Diffusion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", help="what to draw")
    picture = parser.add_argument_group("the picture")
    picture.add_argument("--out", default="drawing.png", help="where it goes")
    size = "height and width, multiples of 64 (default: 512, tiny: 128)"
    picture.add_argument("--size", type=int, nargs="+", metavar="N", default=argparse.SUPPRESS, help=size)
    picture.add_argument("--seed", type=int, default=42, help="of the noise it starts from")
    picture.add_argument("--steps", type=int, default=50, help="DDIM steps, two UNet passes each")
    picture.add_argument("--guidance", type=float, default=7.5, help="how strictly the prompt is followed")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", choices=["sd15", "tiny"], default="sd15", help="its size")
    weights = "its folder, or `random` (default: weights/MODEL)"
    model.add_argument("--weights", metavar="DIR", default=argparse.SUPPRESS, help=weights)
    options = parser.parse_args(argv)
    options.weights = getattr(options, "weights", f"weights/{options.model}")
    options.size = getattr(options, "size", [512 if options.model == "sd15" else 128])
    if Path(options.out).suffix.lower() not in FORMATS:
        parser.error(f"--out {options.out}: end it with one of {' '.join(FORMATS)}")
    if len(options.size) > 2 or any(x < 64 or x % 64 for x in options.size):
        parser.error(f"--size {' '.join(map(str, options.size))}: give one or two multiples of 64")
    if not 1 <= options.steps < TIMES:
        parser.error(f"--steps {options.steps}: give 1 to {TIMES - 1}")
    if options.weights == "random":
        print("random weights: the picture will be noise, whatever the prompt says")

    start = time.time()
    try:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        draw(options.prompt, options).save(options.out)
    except (WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: no picture was written", file=sys.stderr)
        return 130
    print(f"{options.out}: {options.steps} steps, seed {options.seed}, {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
