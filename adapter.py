"""The UNet's conditions: all those of the paper's Table 5 and Figure 1, among them the tagging adapter.

Sections 3.3 and 3.4. All conditions have the same signature, `adapter(tokens, embedding, text)`, and return
the context T(c) that the UNet attends to. The image's tokens `(B, M, C)` and embedding `(B, E)` and the text
vectors come from the frozen CLIP (clip.py); those that a condition does not use may be None.

Top to bottom: inputs and outputs, the simple conditions, the tagging adapter (Eq. 6), its multi-label
objective (Eq. 7: asymmetric loss and targets), the parts of the adapter.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from errors import ModelError
from kernels import IGNORE


class Text(NamedTuple):
    """The encoded words of each image.

    vectors `(B, T, C)`: one pooled vector per tag, padded to the longest list, or the 77 hidden states of a
    prompt; lengths `(B,)`: the number of vectors without padding (1..T), None = T. For an image without words
    the caller passes the empty-prompt vector.
    """

    vectors: Tensor
    lengths: Tensor | None = None


class Condition(NamedTuple):
    """The context `(B, L, C)` that the UNet attends to, or `(1, L, C)` if it is the same for every image.

    lengths `(B,)` as in `Text`; logits `(B, K)`: the tag logits of Eq. 7.
    """

    context: Tensor
    lengths: Tensor | None = None
    logits: Tensor | None = None


class Unconditional(nn.Module):
    """`none`: the empty prompt for every image (section 3.3, 1); empty `(77, C)`: the hidden states of ""."""

    def __init__(self, empty: Tensor):
        super().__init__()
        self.register_buffer("empty", frozen(empty))

    def forward(self, tokens: Tensor | None, embedding: Tensor | None, text: Text | None) -> Condition:
        return Condition(self.empty[None])  # (1, 77, C)


class Words(nn.Module):
    """Each image's words directly to the UNet: the 77 hidden states of a caption or one vector per tag.

    `caption` (section 3.3, 2), `tags` ("directly employing such noisy labels", section 3.4) and `oracle`, the
    ground-truth classes (Figure 1), whose score is an upper bound and not a result: it uses the labels.
    """

    def forward(self, tokens: Tensor | None, embedding: Tensor | None, text: Text | None) -> Condition:
        assert text is not None, "text is None: pass the vectors of the caption or the tags of each image"
        return Condition(text.vectors, text.lengths)


class Classes(nn.Module):
    """`classes`: T(c) = E + gamma MLP(E) over the vectors E of all K class names (Eq. 4).

    VPD's text adapter (vpd/models.py, `TextAdapter`): K tokens, the same for every image. classes `(K, C)`.
    """

    def __init__(self, classes: Tensor):
        super().__init__()
        C = classes.shape[1]
        self.register_buffer("classes", frozen(classes))
        self.mlp = mlp(C, C)
        self.gamma = nn.Parameter(torch.full((C,), 1e-4))  # VPD segmentation/models/vpd_seg.py

    def forward(self, tokens: Tensor | None, embedding: Tensor | None, text: Text | None) -> Condition:
        context = self.classes + self.gamma * self.mlp(self.classes)
        return Condition(context[None])  # (1, K, C)


class Implicit(nn.Module):
    """`implicit`: a caption predicted from the image embedding (Eq. 5), with a gate that starts closed.

    The context of ODISE's implicit captioner (odise/modeling/meta_arch/ldm.py): the MLP of Eq. 5 is one
    Linear, its output is repeated at 77 positions, plus a learned position embedding, times tanh(alpha),
    added to the empty prompt `(77, C)`. ODISE's second branch, which shifts the time embedding, is omitted:
    Eq. 5 is a text condition.

    At initialisation the context is exactly the empty prompt and only alpha has a gradient; all parameters
    have one after the first step.
    """

    def __init__(self, empty: Tensor, embedding_width: int = 768):
        super().__init__()
        C = empty.shape[1]
        self.register_buffer("empty", frozen(empty))
        self.linear = nn.Linear(embedding_width, C)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(empty.shape), std=0.02))  # ODISE's
        self.alpha = nn.Parameter(torch.zeros(empty.shape))

    def forward(self, tokens: Tensor | None, embedding: Tensor | None, text: Text | None) -> Condition:
        assert embedding is not None, "embedding is None: pass CLIP's of the image, (B, 768)"
        caption = self.linear(embedding)[:, None] + self.position  # (B, 77, C)
        return Condition(self.empty + self.alpha.tanh() * caption)


class Tagging(nn.Module):
    """`tagging`: learned queries attend to tags and image, and become the context (Eq. 6; Figure 2 b).

    empty `(77, C)`: the hidden states of ""; classes `(K, C)`: the vectors of the class names, the frozen
    classifier of Eq. 7, also used as the text of every image if `text` is None. 25,612,034 trainable
    parameters at the default sizes, for any K.

    With start "random" the context is m. With start "empty" it is E("")[:Q] + g m with g = 0 at first:
    exactly the first Q tokens of the empty prompt, and the UNet's gradient reaches only g; the other
    parameters learn from Eq. 7 or, if its weight is 0, after the first step. With either start, log_scale and
    bias learn from Eq. 7 only. To compare:
    `python -m lab.ablate --rows "tagging, loss, tags" "tagging from the empty prompt"`.
    """

    def __init__(
        self,
        empty: Tensor,
        classes: Tensor,
        image_width: int = 1024,
        heads: int = 8,
        queries: int = 32,
        blocks: int = 2,
        start: str = "random",
    ):
        super().__init__()
        L, C = empty.shape
        if start not in ("empty", "random"):
            raise ModelError(f"unknown start {start!r} of the adapter: choose 'empty' or 'random'")
        if queries < 1 or blocks < 1:
            raise ModelError(f"need at least 1 query and 1 block, got {queries} and {blocks}")
        if start == "empty" and queries > L:
            raise ModelError(
                f"{queries} queries: the empty prompt has {L} tokens, use at most {L} or start 'random'"
            )

        self.register_buffer("classes", frozen(classes))
        self.queries = nn.Parameter(torch.randn(queries, C))  # with the norm of SD's own tokens, sqrt(C)
        self.image = nn.Linear(image_width, C)
        self.blocks = nn.ModuleList(Block(C, heads) for _ in range(blocks))
        self.mlp = mlp(C, C)
        self.norm = nn.LayerNorm(C)

        from_empty = start == "empty"
        self.register_buffer("empty", frozen(empty[:queries]) if from_empty else None)
        self.register_parameter("g", nn.Parameter(torch.zeros(C)) if from_empty else None)

        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # ours, like the bias; see `logits`
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, tokens: Tensor | None, embedding: Tensor | None, text: Text | None) -> Condition:
        q, text, image = self.prepare(tokens, text)
        for block in self.blocks:
            q = block(q, text, image)
        m = self.norm(self.mlp(q))  # (B, Q, C), with the norm of SD's own tokens

        context = m if self.g is None else self.empty + self.g * m
        return Condition(context, None, self.logits(m))

    def attention(self, tokens: Tensor, text: Text | None) -> Tensor:
        """The attention of each query to each tag in the last block, `(B, Q, T)`, sum 1 over the tags."""
        q, text, image = self.prepare(tokens, text)
        *blocks, last = self.blocks
        for block in blocks:
            q = block(q, text, image)
        return last.attention_weights(q, text)

    def prepare(self, tokens: Tensor | None, text: Text | None) -> tuple[Tensor, Text, Tensor]:
        """Return the inputs of the blocks: queries `(B, Q, C)`, text, projected image tokens `(B, M, C)`."""
        assert tokens is not None, "tokens is None: pass CLIP's of the image, (B, 257, 1024)"
        B = len(tokens)
        if text is None:
            text = Text(self.classes.expand(B, -1, -1))
        self.check(text, B)
        return self.queries.expand(B, -1, -1), text, self.image(tokens)

    def check(self, text: Text, B: int) -> None:
        """Check shapes only: reading values would synchronise the GPU."""
        shape, C = tuple(text.vectors.shape), self.classes.shape[1]
        assert len(shape) == 3 and shape[0] == B and shape[2] == C and shape[1] > 0, (
            f"the text is {shape}: pass at least one vector per image, ({B}, T, {C})"
        )
        assert text.lengths is None or text.lengths.shape == (B,), (
            f"lengths is {tuple(text.lengths.shape)}: pass one number of vectors per image, ({B},)"
        )

    def logits(self, m: Tensor) -> Tensor:
        """Eq. 7 before its sigmoid, `(B, Q, C)` -> `(B, K)` float32: s cos(Pool(m), h_k - mean h) + b.

        The paper uses the product (Pool(m), h_k), which saturates: the product of two of CLIP's class vectors
        is about 365, of one with itself 799. Centring removes their common direction; s and b are learned, h
        is frozen.
        """
        h = self.classes.float()
        pooled = m.float().mean(dim=1)  # (B, C)
        # (B, K); not a matmul, which autocast would round.
        cosine = F.cosine_similarity(pooled[:, None], h - h.mean(dim=0), dim=-1)
        return self.log_scale.exp() * cosine + self.bias


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Return the loss summed over classes and images, and the number of images; logits and targets `(B, K)`.

    A present class costs -(1 - p) ** gamma_positive * log p; an absent one -(1 - q) ** gamma_negative * log q
    with q = min(1 - p + clip, 1), which ignores p below clip. The focusing weights have no gradient. Computes
    in float32: eps would be 0 in float16. Values, gradients and defaults are those of Ridnik et al.
    (Alibaba-MIIL/ASL src/loss_functions/losses.py, `AsymmetricLoss`).
    """
    assert logits.shape == targets.shape, f"{tuple(logits.shape)} logits for {tuple(targets.shape)} targets"
    logits, present = logits.float(), targets > 0.5
    p_right = torch.where(present, logits.sigmoid(), ((-logits).sigmoid() + clip).clamp(max=1))  # (B, K)
    gamma = torch.where(present, gamma_positive, gamma_negative)
    weight = (1 - p_right.detach()) ** gamma
    loss = -weight * p_right.clamp(min=eps).log()
    return loss.sum(), loss.new_full((), len(loss))


def multi_hot(labels: Tensor, K: int) -> Tensor:
    """The classes present in labels `(B, H, W)` int64, 0..K-1 or 255 = ignore: `(B, K)` float32, 0 or 1."""
    assert 1 <= K <= IGNORE, f"{K} classes: use 1 to {IGNORE}, since label {IGNORE} is ignored"
    present = torch.zeros(len(labels), IGNORE + 1, device=labels.device)
    return present.scatter_(1, labels.flatten(1), 1.0)[:, :K]


class Block(nn.Module):
    """Queries attend to themselves, the text and the image, then an MLP; each pre-norm and residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attend_self = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attend_text = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.attend_image = Attention(width, heads)
        self.norm4 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width)

    def forward(self, q: Tensor, text: Text, image: Tensor) -> Tensor:
        q = self.self_attend(q)
        q = q + self.attend_text(self.norm2(q), *text)
        q = q + self.attend_image(self.norm3(q), image)
        return q + self.mlp(self.norm4(q))

    def self_attend(self, q: Tensor) -> Tensor:
        """Self-attention among the queries."""
        q_norm = self.norm1(q)
        return q + self.attend_self(q_norm, q_norm)

    def attention_weights(self, q: Tensor, text: Text) -> Tensor:
        """The attention of each query to each tag in this block, the mean over the heads: `(B, Q, T)`."""
        return self.attend_text.attention_weights(self.norm2(self.self_attend(q)), *text)


class Attention(nn.Module):
    """Multi-head attention of the queries `(B, Q, C)` to the first `lengths (B,)` of the tokens `(B, M, C)`.

    Queries, keys and values have no bias, as in the UNet.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ModelError(f"{heads} heads do not divide the adapter's width of {width}: use a divisor")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (rearrange(y, "B M (n d) -> B n M d", n=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=length_mask(tokens, lengths))
        return self.to_out(rearrange(y, "B n Q d -> B Q (n d)"))

    def attention_weights(self, x: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The softmax of `forward`, the mean over the heads: `(B, Q, M)` float32."""
        q, k = (rearrange(y, "B M (n d) -> B n M d", n=self.heads) for y in (self.to_q(x), self.to_k(tokens)))
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, n, Q, M)
        if lengths is not None:
            scores = scores.masked_fill(~length_mask(tokens, lengths), -torch.inf)
        return scores.softmax(dim=-1).mean(dim=1)


def length_mask(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:
    """A mask of the tokens `(B, M, C)`, `(B, 1, 1, M)` bool, False for padding; None = no padding."""
    if lengths is None:
        return None
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, M)
    return mask[:, None, None]


def mlp(width: int, hidden: int) -> nn.Sequential:
    """C -> hidden -> C with GELU."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def frozen(vectors: Tensor) -> Tensor:
    """Clone: safetensors refuses tensors that share memory."""
    return vectors.detach().clone()
