"""What models are for: their outputs, metrics, and how far a compact model strays from the dense one."""

from .base import Outputs, Ranking, Task
from .embedding import Embedding
from .matching import Matching
from .retrieval import Retrieval, ZeroShot
from .token_prediction import TokenPrediction

__all__ = ["TASKS", "Embedding", "Matching", "Outputs", "Ranking", "Retrieval", "Task", "TokenPrediction", "ZeroShot"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Matching(),
        Retrieval(),
        ZeroShot(),
        Embedding("image-embedding", "image_embeds"),
        Embedding("text-embedding", "text_embeds"),
        TokenPrediction("caption", new_tokens=30),
        TokenPrediction("vqa", new_tokens=10, has_answers=True),
    )
}
