"""Small plain networks of the families that people prune: each takes a batch of examples and returns three outputs."""

import math

import torch
import torch.nn.functional as F
from torch import nn

IMAGES = (2, 8, 8)
TOKENS, VOCABULARY, CLASSES = 5, 11, 3


class ResNet(nn.Module):
    """A stem and two residual blocks with BatchNorm, the second with a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.norm1, self.conv2 = (
            nn.Conv2d(4, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 4, 3, padding=1),
        )
        self.conv3, self.norm3, self.conv4 = nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(4, 6, 1, 2), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(self.shortcut(x) + self.conv4(F.relu(self.norm3(self.conv3(x)))))
        return self.head(x.mean((2, 3)))


class ConvNeXt(nn.Module):
    """A patch stem and one block: depthwise convolution, LayerNorm with channels last, two layers, a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise, self.norm = (
            nn.Conv2d(2, 4, 2, 2),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.LayerNorm(4),
        )
        self.wide, self.narrow, self.scale = nn.Linear(4, 9), nn.Linear(9, 4), nn.Parameter(torch.rand(4))
        self.last, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, its sequence first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 9, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens).transpose(0, 1)).mean(0))


class ViT(nn.Module):
    """Patches, a class token and ``nn.MultiheadAttention`` with the batch first, as torchvision's."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.positions, self.norm1 = nn.Parameter(torch.randn(1, 5, 8)), nn.LayerNorm(8)
        self.attention, self.norm2 = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class Swin(nn.Module):
    """Attention within windows of images, with a table of relative positions, and a merge of patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm1 = nn.Conv2d(2, 8, 2, 2), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(2, 4, 4))
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))
        self.merge, self.head = nn.Linear(32, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)  # (N, 4, 4, 8)
        n, h, w, c = x.shape
        windows = self.norm1(x).reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).reshape(len(windows), 4, 3, 2, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + self.table).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + y.reshape(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        x = x + self.mlp(self.norm2(x))
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).flatten(3)
        return self.head(F.gelu(self.merge(x)).mean((1, 2)))


class BERT(nn.Module):
    """Embeddings that add up, queries, keys and values of their own, and norms behind the residuals."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.norm = nn.Embedding(VOCABULARY, 8), nn.Embedding(TOKENS, 8), nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.norm1 = nn.Linear(8, 8), nn.LayerNorm(8)
        self.wide, self.narrow, self.norm2 = nn.Linear(8, 9), nn.Linear(9, 8), nn.LayerNorm(8)
        self.pooler, self.head = nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def heads(self, x):
        return x.view(*x.shape[:2], 2, -1).transpose(1, 2)

    def forward(self, tokens):
        x = self.norm(self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        x = self.norm2(x + self.narrow(F.gelu(self.wide(x))))
        return self.head(self.pooler(x[:, 0]).tanh())


class Conv1D(nn.Module):
    """A linear layer whose weight lies ``(in, out)``, as Hugging Face's GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.weight.shape[1])


class GPT2(nn.Module):
    """One projection for queries, keys and values, causal attention and norms before it."""

    def __init__(self):
        super().__init__()
        self.words, self.norm1 = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.qkv, self.out, self.norm2 = Conv1D(8, 24), Conv1D(8, 8), nn.LayerNorm(8)
        self.wide, self.narrow, self.last = Conv1D(8, 9), Conv1D(9, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES, bias=False)

    def forward(self, tokens):
        x = self.words(tokens)
        q, k, v = (
            part.view(*part.shape[:2], 2, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return self.head(self.last(x)[:, -1])


class Llama(nn.Module):
    """RMSNorm, rotary positions, two queries for each key, a gated MLP, no biases."""

    def __init__(self):
        super().__init__()
        self.words, self.norm1 = nn.Embedding(VOCABULARY, 8), nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, size, bias=False) for size in (16, 8, 8))
        self.out, self.norm2 = nn.Linear(16, 8, bias=False), nn.RMSNorm(8)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((8, 9), (8, 9), (9, 8)))
        self.last, self.head = nn.RMSNorm(8), nn.Linear(8, CLASSES, bias=False)

    def rotated(self, x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] / (
            1 + torch.arange(2, device=x.device)
        )
        cosine, sine = (torch.cat([f(angle)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        return x * cosine + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine

    def forward(self, tokens):
        x = self.words(tokens)
        y = self.norm1(x)
        q, k, v = (layer(y).view(*y.shape[:2], -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (self.rotated(k), v))
        attended = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x)[:, -1])


class LSTM(nn.Module):
    """Two recurrent layers between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.words, self.enter = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 5)
        self.lstm, self.head = nn.LSTM(5, 4, num_layers=2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, tokens):
        return self.head(self.lstm(self.enter(self.words(tokens)))[0][:, -1])


FAMILIES = {kind.__name__: kind for kind in (ResNet, ConvNeXt, Encoder, ViT, Swin, BERT, GPT2, Llama, LSTM)}


def made(family, dtype=torch.float64, seed=0):
    """A network in eval mode, and two batches of inputs and labels, of four and of two examples."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    images = family in ("ResNet", "ConvNeXt", "ViT", "Swin")
    batches = []
    for count in (4, 2):
        inputs = torch.randn(count, *IMAGES, dtype=dtype) if images else torch.randint(VOCABULARY, (count, TOKENS))
        batches.append((inputs, torch.randint(CLASSES, (count,))))
    return model, batches
