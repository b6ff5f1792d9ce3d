"""Images as sequences of patches."""

import pytest
import torch
import torch.nn.functional as F
from weights import perturb

from tfkern.models import Transformer, TransformerConfig, cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = TransformerConfig(
    dim=24, heads=3, layers=1, architecture="encoder", image_size=12, patch_size=4,
    head="classification", classes=5,
)  # fmt: skip


def make():
    return perturb(Transformer(IMAGES).double().eval())


def test_patches_are_products():
    """A convolution whose stride is its size: every patch times one matrix."""
    model = make()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)
    projection = model.embedding.projection
    expected = patches @ projection.weight.flatten(1).T + projection.bias
    y = model.embedding(x) - model.embedding.positions
    torch.testing.assert_close(y[:, 1:], expected)
    torch.testing.assert_close(y[:, 0], model.embedding.first[0].expand(2, -1))


def test_other_image_sizes():
    """The positions are those that transformers interpolates."""
    huggingface = pytest.importorskip("huggingface")
    theirs = huggingface.CASES["vit"].model()
    model = make()
    with torch.no_grad():
        model.embedding.positions.copy_(theirs.vit.embeddings.position_embeddings)
        for height, width in ((20, 20), (12, 24), (8, 4)):
            x = torch.zeros(1, 3, height, width, dtype=torch.float64)
            patches = torch.zeros(1, 1 + height * width // 16, 24, dtype=torch.float64)
            expected = theirs.vit.embeddings.interpolate_pos_encoding(patches, height, width)
            y = model.embedding(x) - model.embedding.projection.bias
            torch.testing.assert_close(y[:, 1:], expected[:, 1:], rtol=0, atol=1e-10)
            assert model(x).shape == (1, 5)


@pytest.mark.slow
def test_handwritten_digits():
    """A small ViT reads the digits that come with scikit-learn."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    targets, order = torch.tensor(digits.target), torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    config = TransformerConfig(
        dim=64, layers=4, heads=4, architecture="encoder", image_size=8, patch_size=2, channels=1,
        activation="gelu", head="classification", classes=10, init="truncated",
    )  # fmt: skip
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.2e6, rel=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=600)
    for _ in range(600):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == targets[test]).float().mean().item()
    assert accuracy >= 0.94


def test_errors():
    model = Transformer(IMAGES)
    for shape in ((1, 3, 10, 12), (1, 4, 12, 12), (3, 12, 12), (1, 3, 0, 12)):
        with pytest.raises(ValueError, match="height, width\\) with multiples of 4, got"):
            model(torch.zeros(shape))
