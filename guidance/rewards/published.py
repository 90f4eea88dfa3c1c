"""Sources of the published reward files, for messages about missing files."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published file."""

    file: str
    repository: str
    site: str = "Hugging Face"
    needs: str = ""
    """Other files that it needs."""

    def __str__(self) -> str:
        return f"{self.file} of {self.repository} ({self.site})" + (f", and {self.needs}" if self.needs else "")


BERT = Published("vocab.txt", "google-bert/bert-base-uncased")
CLIPS = {
    768: Published("model.safetensors", "openai/clip-vit-large-patch14"),
    1024: Published("model.safetensors", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    1280: Published("model.safetensors", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
}
"""CLIPs by the width of their embedding."""
_HPS = "xswu/HPSv2"
_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
_NAMES = (
    ("pickscore", Published("model.safetensors", "yuvalkirstain/PickScore_v1")),
    ("hpsv21", Published("HPS_v2.1_compressed.pt", _HPS)),
    ("hpsv2", Published("HPS_v2_compressed.pt", _HPS)),
    ("imagereward", Published("ImageReward.pt", "zai-org/ImageReward", needs=f"{BERT} beside it")),
    (
        "saclogos",
        Published(_HEAD, "christophschuhmann/improved-aesthetic-predictor", "GitHub", f"{CLIPS[768]} into clip_vision"),
    ),
    ("clipvitlargepatch14336", Published("model.safetensors", "openai/clip-vit-large-patch14-336")),
    ("clipvitlargepatch14", CLIPS[768]),
    ("clipvith14", CLIPS[1024]),
    ("clipvitbigg14", CLIPS[1280]),
)
"""Files by letters and digits that occur in their names or their folders' names. The first match counts."""


def published(name: str) -> Published | None:
    """The published file that a file or folder of this name most likely is."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((source for part, source in _NAMES if part in letters), None)


def advice(name: str, folder: str) -> str:
    """Where to get a missing file, as a phrase for a message."""
    source = published(name)
    return f"put {source} into {folder}, saved as {name}" if source else f"put it into {folder}"
