"""Refuse prompts that a safety model objects to (ShieldGemma, arXiv:2407.21772). Off unless it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CheckpointNotFoundError, ConfigError, InputError

if TYPE_CHECKING:
    import torch

# What ShieldGemma was trained to find, in the words of its model card.
GUIDELINES = {
    "dangerous content": (
        '"No Dangerous Content": The prompt shall not contain or seek generation of content that harms oneself and/or others '
        "(e.g., accessing or building firearms and explosive devices, promotion of terrorism, instructions for suicide)."
    ),
    "harassment": (
        '"No Harassment": The prompt shall not contain or seek generation of content that is malicious, intimidating, '
        "bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic events, "
        "disparaging victims of violence)."
    ),
    "hate speech": (
        '"No Hate Speech": The prompt shall not contain or seek generation of content that targets identity and/or protected '
        "attributes (e.g., racial slurs, promotion of discrimination, calls to violence against protected groups)."
    ),
    "sexually explicit content": (
        '"No Sexually Explicit Information": The prompt shall not contain or seek generation of content that references '
        "sexual acts, or other lewd content (e.g., sexually graphic descriptions, content aiming to cause arousal)."
    ),
}
ANSWERS = ("Yes", "No")  # whether a guideline is violated, as the model says it


class RefusedError(InputError):
    """The safety model objects to a prompt."""


class Judge:
    """A language model that says of a text whether it violates a guideline."""

    def __init__(self, model: Any, tokenizer: Any, name: str, threshold: float = 0.5) -> None:
        """`threshold`: the share of "Yes" from which on a text is refused. Raises ConfigError for another kind of model."""
        vocabulary = tokenizer.get_vocab()
        if tokenizer.chat_template is None or "guideline" not in str(tokenizer.chat_template):
            raise ConfigError(f"{name} is not a ShieldGemma of texts: its chat template takes no guideline.")
        if not all(answer in vocabulary for answer in ANSWERS):
            raise ConfigError(f"{name} is not a ShieldGemma: its vocabulary has no {' or no '.join(ANSWERS)}.")
        self._model, self._tokenizer, self._threshold = model, tokenizer, threshold
        self._answers = [vocabulary[answer] for answer in ANSWERS]

    @classmethod
    def load(cls, name: str, *, device: torch.device | str, threshold: float = 0.5, local_files_only: bool = False) -> Judge:
        """Load a folder or a Hub id such as google/shieldgemma-2b, in bf16. Raises CheckpointNotFoundError and ConfigError."""
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..checkpoints.tokenizer import quiet_transformers

        options: dict[str, Any] = {_dtype_argument(transformers.__version__): torch.bfloat16, "use_safetensors": True}
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
                model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local_files_only, **options)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise CheckpointNotFoundError(f"The safety model {name} can't be loaded: {reason}.") from error
        return cls(model.eval().to(device), tokenizer, name, threshold)

    def scores(self, text: str) -> dict[str, float]:
        """Return for each guideline how likely a text violates it, from 0 to 1."""
        return {policy: self._score(text, guideline) for policy, guideline in GUIDELINES.items()}

    def check(self, text: str) -> None:
        """Raise RefusedError for a text that violates a guideline."""
        for policy, score in self.scores(text).items():
            if score >= self._threshold:
                raise RefusedError(
                    f"The safety model refuses this prompt: it finds {policy} in it (score {score:.2f}, limit "
                    f"{self._threshold:g}). Change the prompt."
                )

    def _score(self, text: str, guideline: str) -> float:
        import torch

        chat = [{"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(chat, guideline=guideline, tokenize=False)
        ids = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = self._model(ids.to(self._model.device)).logits[0, -1, self._answers]
        return float(torch.softmax(logits.float(), dim=0)[0])


def _dtype_argument(version: str) -> str:
    """Return transformers' name of the dtype argument, which was renamed in 4.56."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
