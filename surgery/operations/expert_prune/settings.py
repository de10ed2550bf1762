"""The settings of `expert_prune`."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from surgery.operations.base import Settings
from surgery.operations.experts.criteria import FAMILY, WEIGHTS_ONLY, Criterion, Weighting
from surgery.sizes import parse_size

Positive = Annotated[int, Field(ge=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _size(value: str) -> str:
    parse_size(value)
    return value


Size = Annotated[str, AfterValidator(_size), WithJsonSchema({"type": "string", "pattern": "^[0-9.]+ ?(K|M|G)i?B$"})]
Keep: TypeAlias = (
    Positive
    | Annotated[float, Field(gt=0, lt=1)]
    | Size
    | Annotated[list[Positive], Field(min_length=1)]
    | Annotated[list[Ids], Field(min_length=1)]
)


class ExpertPruneSettings(Settings):
    """How many experts stay, and which."""

    keep: Keep = Field(
        default=0.5,
        description="experts that stay in each layer: a share, a number, a list with a number per MoE layer, a list "
        "with the ids per MoE layer, or a size such as 12GB that the whole checkpoint must not exceed",
    )
    criterion: Criterion = Field(
        default="reap",
        description="what an expert is worth: a name, or {b, alpha, beta} of the family that the calibrated ones are "
        "of; aimer and router_norm look at weights only",
    )
    allocation: Literal["uniform", "measured"] = Field(
        default="uniform",
        description="as many experts in every layer, which stock classes hold; or as many in all, spread over layers "
        "by measured damage, which needs code",
    )
    statistics: Literal["one_shot", "layerwise"] = Field(
        default="one_shot",
        description="all layers are measured in the base, so that one measurement serves every keep; or each layer "
        "after those before it were cut",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the criterion random")
    min_tokens: Positive = Field(
        default=100, description="an expert that calibration gives fewer tokens than this is told of"
    )
    calibration_required: bool = Field(
        default=False, description="refuse, rather than tell, where an expert gets fewer tokens than min_tokens"
    )
    fallback: Literal["man"] | None = Field(
        default=None, description="criterion of the layers in which an expert gets fewer tokens than min_tokens"
    )
    protect_super_experts: bool = Field(
        default=True,
        description="never drop an expert of the first three quarters of layers whose largest output is above the "
        "99.5th percentile and a tenth of the largest of all",
    )
    mass_correction: bool = Field(
        default=False,
        description="scale experts so that the routed weights keep their mean sum, where families do not renormalise; "
        "used only if it lowers the divergence on held-out calibration windows",
    )
    drafts: Literal["prune", "drop"] = Field(
        default="prune", description="draft (MTP) layers: cut as the last layer is, or left out"
    )

    @property
    def explicit(self) -> list[list[int]] | None:
        """The ids that stay, where the settings give them."""
        if isinstance(self.keep, list) and isinstance(self.keep[0], list):
            return [ids for ids in self.keep if isinstance(ids, list)]
        return None

    @property
    def weighting(self) -> Weighting | None:
        """The calibrated criterion by its numbers; None for the others."""
        return self.criterion if isinstance(self.criterion, Weighting) else FAMILY.get(self.criterion)

    @property
    def calibrates(self) -> bool:
        """Whether the model must run on text."""
        if self.mass_correction or (self.allocation == "measured" and self.explicit is None):
            return True
        return self.explicit is None and self.weighting is not None

    @property
    def weights_only(self) -> bool:
        """Whether weights are measured and nothing runs."""
        return not self.calibrates and self.explicit is None and self.criterion in WEIGHTS_ONLY

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = isinstance(self.keep, list)
        if named and self.allocation == "measured":
            raise ValueError("can have allocation: measured only with one number, share or size for all layers")
        if self.explicit is not None and (self.calibration_required or self.fallback or self.statistics == "layerwise"):
            raise ValueError("names the ids, and calibration_required, fallback and layerwise are for choosing them")
        if self.calibration_required and self.weighting is None:
            raise ValueError("can have calibration_required only with a criterion that calibration gives")
        if self.statistics == "layerwise" and (self.allocation == "measured" or self.weighting is None):
            raise ValueError(
                "can have statistics: layerwise only with allocation: uniform and a criterion that calibration gives"
            )
        if self.fallback is not None and self.weighting is None:
            raise ValueError("can have a fallback only with a criterion that calibration gives")
        return self
