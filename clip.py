"""CLIP ViT-L/14: the tokenizer, the text tower (Stable Diffusion v1.5's text encoder) and the image tower.

Attribute names are those of the Hugging Face file of openai/clip-vit-large-patch14, its spelling
`pre_layrnorm` included, so its weights load strictly. Equal to transformers' `CLIPModel` and `CLIPTokenizer`
(tests/test_clip.py).

Top to bottom: the tokenizer, the model, zero-shot tags, the two towers, the transformer they share.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor, nn

from errors import WeightsError
from kernels import own_type
from kernels.linear import Linear

START, END = "<|startoftext|>", "<|endoftext|>"
# openai/CLIP clip/simple_tokenizer.py
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
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
    vocabulary: int = 49_408  # the last id is the end token
    positions: int = 77
    image_size: int = 224
    patch: int = 14
    projection: int = 768  # E, width of the space that texts and images share

    @classmethod
    def tiny(cls) -> "CLIPConfig":
        """A miniature for 128x128 images, with its own small vocabulary."""
        tower = TowerConfig(width=128, layers=4, heads=4)
        return cls(text=tower, image=tower, vocabulary=1024, image_size=128, patch=16, projection=128)


class Tokenizer:
    """Encode T texts as ids `(T, 77)` int64: start, byte-pair tokens, end; padded with end tokens.

    `folder` holds `vocab.json` and `merges.txt`; WeightsError unless they agree. Special tokens inside a
    text, as "<|endoftext|>", are encoded as plain characters.
    """

    def __init__(self, folder: str | Path, positions: int = 77):
        files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: `python -m weights.fetch` downloads it")
        try:
            vocabulary, lines = json.loads(files[0].read_bytes()), files[1].read_text("utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines[1:] if line]  # the first is a version
            if vocabulary != token_ids(merges, vocabulary[END] + 1):
                raise ValueError("they do not agree")
            self.prepare(vocabulary, merges, positions)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            cause = " ".join(str(error).split()) if isinstance(error, ValueError) else "they do not agree"
            raise WeightsError(
                f"{files[0]} or {files[1].name} is corrupt ({cause}): delete both; "
                "`python -m weights.fetch` downloads them again"
            ) from None

    @classmethod
    def spelling(cls, vocabulary: int, positions: int = 77) -> "Tokenizer":
        """Make a tokenizer for random weights: it needs no files and encodes words byte by byte."""
        assert vocabulary >= 514, f"a vocabulary of {vocabulary} is too small: bytes need 514"
        tokenizer = cls.__new__(cls)
        tokenizer.prepare(token_ids([], vocabulary), [], positions)
        return tokenizer

    def prepare(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], positions: int) -> None:
        """Set up the byte-pair encoder."""
        self.positions = positions
        bpe = models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
        self.bpe = BPETokenizer(bpe)
        blanks = normalizers.Replace(Regex(r"\s+"), " ")
        self.bpe.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        self.start, self.end = self.bpe.token_to_id(START), self.bpe.token_to_id(END)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode the texts; those over 75 tokens are truncated (the end token is kept) with a warning."""
        rows, longest = self.encode(texts), self.positions - 2
        if long := self.too_long(texts):
            warnings.warn(
                f"truncated {len(long)} of {len(rows)} texts to {longest} tokens; "
                f"the first one starts with {long[0][:60]!r}",
                stacklevel=2,
            )
        ids = torch.full((len(rows), self.positions), self.end)
        ids[:, 0] = self.start
        for i, row in enumerate(rows):
            ids[i, 1 : 1 + min(len(row), longest)] = torch.tensor(row[:longest], dtype=torch.int64)
        return ids

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """The texts that have more than 75 tokens."""
        rows = self.encode(texts)
        return [text for text, row in zip(texts, rows, strict=True) if len(row) > self.positions - 2]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The byte-pair tokens of each text, without start and end."""
        # Surrogates of broken JSON or of a Latin-1 terminal, which the library refuses: joined or replaced.
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return [encoding.ids for encoding in self.bpe.encode_batch(texts, add_special_tokens=False)]


def token_ids(merges: Sequence[tuple[str, str]], vocabulary: int) -> dict[str, int]:
    """The tokens of CLIP: bytes, bytes that end a word, merges in their order; start and end are the last two
    of the `vocabulary` ids (openai/CLIP clip/simple_tokenizer.py).
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256
    tokens = [*letters, *(f"{x}</w>" for x in letters), *(left + right for left, right in merges)]
    table = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return table | {START: vocabulary - 2, END: vocabulary - 1}


class CLIP(nn.Module):
    """Both towers and the projections into their shared space of E channels."""

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        self.vision_model = ImageTower(config)
        self.text_projection = nn.Linear(config.text.width, config.projection, bias=False)
        self.visual_projection = nn.Linear(config.image.width, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), CLIP's initial value

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids `(T, L)` int64, L <= 77: hidden states `(T, L, 768)`, pooled `(T, 768)`.

        The hidden states, after the final norm, are Stable Diffusion's context; pooled is the one of the end
        token, and `text_projection(pooled)` the embedding in the shared space. The tower is causal: dropping
        the padding after the longest text does not change `pooled`.
        """
        T, L = ids.shape
        assert L <= self.config.positions, (
            f"{L} tokens for {self.config.positions} positions: truncate the texts"
        )
        hidden = self.text_model(ids)
        end = (ids == self.config.vocabulary - 1).int().argmax(dim=1)  # the first one; later ones are padding
        return hidden, hidden[torch.arange(T, device=ids.device), end]

    def image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images `(B, 3, H, W)` in [-1, 1] of any size: tokens `(B, 257, 1024)`, embedding `(B, 768)`.

        The tokens are the last hidden states before `post_layernorm`, class token first; the embedding is the
        projection of the normed class token. Differentiable with respect to the image.
        """
        weight = self.visual_projection.weight
        with own_type(weight):
            tokens = self.vision_model(pixels(image, self.config.image_size).to(weight.dtype))
            embedding = self.visual_projection(self.vision_model.post_layernorm(tokens[:, 0]))
        return tokens, embedding


@torch.no_grad()
def name_vectors(
    clip: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], shared: bool = False
) -> Tensor:
    """Average each name's pooled vector over templates like "a photo of a {}": `(T, C)`.

    `shared`: average the unit vectors in the shared space, and normalise, `(T, E)`, for zero-shot
    classification. Encodes one name at a time, without autocast: batching would change the last bits and
    break exact resume.
    """
    device = clip.logit_scale.device
    vectors = []
    for name in names:
        ids = tokenizer([template.format(name) for template in templates])
        longest = int((ids != tokenizer.end).sum(dim=1).max()) + 1  # the rest is padding
        with torch.autocast(device.type, enabled=False):
            pooled = clip.text(ids[:, :longest].to(device))[1]
            if shared:
                pooled = F.normalize(clip.text_projection(pooled), dim=-1)
        vectors.append(pooled.mean(dim=0))
    return F.normalize(torch.stack(vectors), dim=-1) if shared else torch.stack(vectors)


def zero_shot(clip: CLIP, embedding: Tensor, names: Tensor) -> Tensor:
    """The probability `(B, K)` of each name: image embeddings `(B, E)`, unit name vectors `(K, E)`."""
    with torch.autocast(embedding.device.type, enabled=False):  # bfloat16 near 25 has steps of 0.125
        cosine = F.normalize(embedding.float(), dim=-1) @ names.float().T
    return (clip.logit_scale.exp() * cosine).softmax(dim=-1)


@torch.no_grad()
def zero_shot_tags(
    clip: CLIP, image: Tensor, names: Sequence[str], vectors: Tensor, threshold: float | None = None
) -> list[list[tuple[str, float]]]:
    """Tag images `(B, 3, H, W)`: the likely of K names with their probabilities, best first.

    vectors `(K, E)`: the names' in the shared space. Likely are those of at least `threshold`, by default
    chance, 1/K; the best name always is one.
    """
    with torch.autocast(image.device.type, enabled=False):  # so that training and test have the same tags
        _, embedding = clip.image(image)
    return likely_names(clip, embedding, names, vectors, threshold)


def likely_names(
    clip: CLIP, embedding: Tensor, names: Sequence[str], vectors: Tensor, threshold: float | None
) -> list[list[tuple[str, float]]]:
    """As `zero_shot_tags`, of images whose embeddings `(B, E)` are at hand."""
    tags = []
    for p in zero_shot(clip, embedding, vectors).cpu():
        order = p.argsort(descending=True, stable=True).tolist()
        least = 1 / len(p) if threshold is None else threshold
        likely = order[: max(int((p >= least).sum()), 1)]
        tags.append([(names[k], float(p[k])) for k in likely])
    return tags


def pixels(image: Tensor, size: int) -> Tensor:
    """Images `(B, 3, H, W)` in [-1, 1] -> `(B, 3, size, size)` float32, normalised as in CLIP's training.

    Bicubic with antialiasing, clamped as 8-bit images are. The whole image is resized to a square, where CLIP
    crops the centre: dense prediction needs the margins too.
    """
    image = image.float()
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    channels = zip(image.unbind(dim=1), MEAN, STD, strict=True)
    return torch.stack([(x / 2 + 0.5 - mean) / std for x, mean, std in channels], dim=1)


class TextTower(nn.Module):
    """Ids `(T, L)` -> hidden states after the final norm `(T, L, 768)`."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text)
        self.final_layer_norm = nn.LayerNorm(config.text.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))


class TextEmbeddings(nn.Module):
    """The sum of token and position embeddings."""

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
        self.post_layernorm = nn.LayerNorm(config.image.width)  # of the class token only, see `CLIP.image`

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)


class ImageEmbeddings(nn.Module):
    """Patch embeddings after a class token, plus position embeddings."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, patches = config.image.width, (config.image_size // config.patch) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width).mul_(width**-0.5))
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        patches = rearrange(patches, "B C h w -> B (h w) C")
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight  # (B, 257, 1024)


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
    """Self-attention, MLP; each pre-norm and residual."""

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
    """C -> 4 C -> C with quick_gelu."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), as OpenAI trained CLIP; not the exact GELU."""
    return x * torch.sigmoid(1.702 * x)
