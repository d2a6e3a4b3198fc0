"""CLIP ViT-L/14: the tokenizer, the text tower (which is Stable Diffusion v1.5's text encoder) and the image
tower.

Attribute names are those of the Hugging Face file of openai/clip-vit-large-patch14, its spelling
`pre_layrnorm` included, so its weights load strictly. Equal to transformers' `CLIPModel` and `CLIPTokenizer`
(tests/test_clip.py).

Top to bottom: texts to ids, the model, its two towers, the transformer they share.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.linear import Linear

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # openai/CLIP clip/simple_tokenizer.py
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]; openai/CLIP clip/clip.py, `_transform`
STD = (0.26862954, 0.26130258, 0.27577711)

PROMPT = "a photo of a {}"  # VPD's for ADE20K (wl-zhao/VPD#22)
# The 80 prompts of zero-shot ImageNet (openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb), by form.
VIEWS = "bad|low resolution|cropped|bright|dark|close-up|black and white|pixelated|jpeg corrupted|blurry|good"
WORKS = "a photo|a sculpture|a rendering|a rendition|a tattoo|a drawing|a painting|a doodle|a sketch"
WORKS += "|graffiti|art|itap"
QUALITIES = "hard to see|clean|dirty|cool|large|nice|weird|small"
MATERIALS = "embroidered|plastic|origami|toy|cartoon|plushie"
FORMS = (
    *(f"a {view} photo of <the> {{}}." for view in VIEWS.split("|")),
    *(f"{work} of <the> {{}}." for work in WORKS.split("|")),
    *(f"a photo of <the> {quality} {{}}." for quality in QUALITIES.split("|")),
    *(f"<the> {material} {{}}." for material in MATERIALS.split("|")),
    "<the> {} in a video game.",
)
TEMPLATES = (
    *(form.replace("<the>", article) for form in FORMS for article in ("a", "the")),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)


@dataclass(frozen=True)
class TowerConfig:
    """A transformer: its width, depth and number of heads; the MLP is four times as wide."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the default is CLIP ViT-L/14."""

    text: TowerConfig = TowerConfig(width=768, layers=12, heads=12)
    image: TowerConfig = TowerConfig(width=1024, layers=24, heads=16)
    vocabulary: int = 49_408  # the last id ends a text
    positions: int = 77
    image_size: int = 224
    patch: int = 14
    projection: int = 768  # width of the space that texts and images share

    @classmethod
    def tiny(cls) -> "CLIPConfig":
        """The miniature for 128x128 pictures and its own small vocabulary."""
        tower = TowerConfig(width=128, layers=4, heads=4)
        return cls(text=tower, image=tower, vocabulary=1024, image_size=128, patch=16, projection=128)


class Tokenizer:
    """Texts to ids `(T, 77)` int64: start, byte-pair tokens, end, then more ends, as Stable Diffusion pads.

    `folder` holds `vocab.json` and `merges.txt`. No markup is read: "<|endoftext|>" inside a text is spelled
    out, so that a file of tags cannot move the end.
    """

    def __init__(self, folder: str | Path, positions: int = 77):
        files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing; `python -m weights.fetch` gets the tokenizer's files"
                )
        try:
            self.prepare(tokenizers.models.BPE.read_file(*map(str, files)), positions)
            if None in (self.start, self.end):
                raise ValueError(f"{START} or {END} is missing")
        except Exception as error:  # noqa: BLE001  tokenizers raises no other class
            raise OSError(
                f"{files[0]} or {files[1].name} is damaged ({error}): remove both; "
                "`python -m weights.fetch` gets them anew"
            ) from None

    @classmethod
    def spelling(cls, vocabulary: int, positions: int = 77) -> "Tokenizer":
        """One that needs no files and spells every word byte by byte, for random weights.

        Start and end are the last two of the `vocabulary` ids, where CLIP has them too.
        """
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # 256
        ids = [*letters, *(f"{letter}</w>" for letter in letters)]
        assert vocabulary >= len(ids) + 2, f"a vocabulary of {vocabulary}: bytes alone need {len(ids) + 2}"
        table = {token: i for i, token in enumerate(ids)} | {START: vocabulary - 2, END: vocabulary - 1}
        tokenizer = cls.__new__(cls)
        tokenizer.prepare((table, []), positions)
        return tokenizer

    def prepare(self, vocabulary_and_merges: tuple[dict, list], positions: int) -> None:
        self.positions = positions
        bpe = tokenizers.models.BPE(*vocabulary_and_merges, unk_token=END, end_of_word_suffix="</w>")
        self.bpe = tokenizers.Tokenizer(bpe)
        self.bpe.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.NFC(),
                tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                tokenizers.normalizers.Lowercase(),
            ]
        )
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.start, self.end = self.bpe.token_to_id(START), self.bpe.token_to_id(END)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Never raises: a text of more than 75 tokens loses its tail, not its end, and a warning says so."""
        rows = [encoding.ids for encoding in self.bpe.encode_batch(list(texts), add_special_tokens=False)]
        room = self.positions - 2
        long = [text for text, row in zip(texts, rows, strict=True) if len(row) > room]
        if long:
            warnings.warn(
                f"{len(long)} of {len(rows)} texts have more than {room} tokens and lost their tails; "
                f"the first one begins {long[0][:60]!r}",
                stacklevel=2,
            )
        ids = torch.full((len(rows), self.positions), self.end)
        ids[:, 0] = self.start
        for i, row in enumerate(rows):
            ids[i, 1 : 1 + min(len(row), room)] = torch.tensor(row[:room], dtype=torch.int64)
        return ids


class CLIP(nn.Module):
    """Both towers and the projections into their shared space."""

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        self.vision_model = ImageTower(config)
        self.text_projection = nn.Linear(config.text.width, config.projection, bias=False)
        self.visual_projection = nn.Linear(config.image.width, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), where CLIP's training starts

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids `(T, L)` int64, L <= 77 -> hidden `(T, L, 768)` after the final norm, pooled `(T, 768)`: hidden
        at the end.

        Stable Diffusion's context is `hidden`; `text_projection(pooled)` is the text's place in the shared
        space. The tower is causal, so ids may be cut behind their longest text: exact for `pooled`.
        """
        T, L = ids.shape
        assert L <= self.config.positions, (
            f"{L} tokens, but the tower has {self.config.positions} positions: cut the text"
        )
        hidden = self.text_model(ids)
        # The first end; those behind it are padding.
        end = (ids == self.config.vocabulary - 1).int().argmax(dim=1)
        return hidden, hidden[torch.arange(T, device=ids.device), end]

    def image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image `(B, 3, H, W)` in [-1, 1], any size -> tokens `(B, 257, 1024)`, embedding `(B, 768)`.

        The tokens are the last hidden state, the class token first, before `post_layernorm`; the embedding is
        the projection of the normed class token. Differentiable with respect to the image.
        """
        tokens = self.vision_model(pixels(image, self.config.image_size))
        embedding = self.visual_projection(self.vision_model.post_layernorm(tokens[:, 0]))
        return tokens, embedding


@torch.no_grad()
def name_vectors(
    clip: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], shared: bool = False
) -> Tensor:
    """The mean, over templates like "a photo of a {}", of each name's pooled vector: `(T, C)`.

    `shared`: the mean of the unit vectors in the space of pictures, at unit length `(T, P)`, as zero-shot
    classification takes it. Name by name, and never rounded by autocast: a vector must not depend on which
    others were made beside it, or a run could not go on exactly.
    """
    device = clip.logit_scale.device
    vectors = []
    for name in names:
        ids = tokenizer([template.format(name) for template in templates])
        longest = int((ids != tokenizer.end).sum(dim=1).max()) + 1  # behind it there are ends only
        with torch.autocast(device.type, enabled=False):
            pooled = clip.text(ids[:, :longest].to(device))[1]
            if shared:
                pooled = F.normalize(clip.text_projection(pooled), dim=-1)
        vectors.append(pooled.mean(dim=0))
    return F.normalize(torch.stack(vectors), dim=-1) if shared else torch.stack(vectors)


def zero_shot(clip: CLIP, embedding: Tensor, names: Tensor) -> Tensor:
    """The probability `(B, K)` of each name, picture embeddings `(B, P)`, names `(K, P)` at unit length."""
    with torch.autocast(embedding.device.type, enabled=False):  # bfloat16 has steps of 0.125 at a logit of 25
        cosine = F.normalize(embedding.float(), dim=-1) @ names.float().T
    return (clip.logit_scale.exp() * cosine).softmax(dim=-1)


def pixels(image: Tensor, size: int) -> Tensor:
    """Image `(B, 3, H, W)` in [-1, 1] -> `(B, 3, size, size)` float32 as CLIP was trained on them.

    Bicubic with antialiasing, clamped as an 8-bit picture is. The whole picture is squashed into the square,
    where CLIP crops the middle: dense prediction needs the margins too.
    """
    image = image.float()
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    channels = zip(image.unbind(dim=1), MEAN, STD, strict=True)
    return torch.stack([(x / 2 + 0.5 - mean) / std for x, mean, std in channels], dim=1)


class TextTower(nn.Module):
    """ids `(T, L)` -> hidden states after the final norm `(T, L, 768)`."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text)
        self.final_layer_norm = nn.LayerNorm(config.text.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))


class TextEmbeddings(nn.Module):
    """The vectors of tokens and positions, added."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.text.width)
        self.position_embedding = nn.Embedding(config.positions, config.text.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ImageTower(nn.Module):
    """Pixels `(B, 3, 224, 224)` -> last hidden state `(B, 257, 1024)`, class token first."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.image.width)
        self.encoder = Encoder(config.image)
        self.post_layernorm = nn.LayerNorm(config.image.width)  # of the class token alone, see CLIP.image

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)


class ImageEmbeddings(nn.Module):
    """One vector per patch, a class token before them, positions added."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, patches = config.image.width, (config.image_size // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        patches = rearrange(patches, "B C h w -> B (h w) C")
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 257, 1024)


class Encoder(nn.Module):
    """The transformer of both towers: `(B, N, C)` -> `(B, N, C)`; causal for texts."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, causal)
        return x


class Layer(nn.Module):
    """Self-attention, MLP; each pre-norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention of `(B, N, C)`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(y, "B N (n d) -> B n N d", n=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(rearrange(y, "B n N d -> B N (n d)"))


class MLP(nn.Module):
    """Width C -> 4 C -> C."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): what OpenAI trained with; the exact GELU is wrong here."""
    return x * torch.sigmoid(1.702 * x)
