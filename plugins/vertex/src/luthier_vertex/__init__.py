"""The provider `vertex`: tuning jobs at Google's Vertex AI. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = 117  # characters: a display name has 128, and eleven name the job
FOLDER = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](?:/[^/\s?#*\[\]]+)*/?")


@attrs.frozen(kw_only=True)
class Vertex:
    project: str | None = option(None, help="The project; none: what GOOGLE_CLOUD_PROJECT says.")
    location: str | None = option(None, help="The region, such as us-central1; none: what GOOGLE_CLOUD_LOCATION says.")
    gcs_folder: str | None = option(None, help="Where rows and results lie, such as gs://BUCKET/luthier.")
    access_token: str | None = option(
        None, help="Where a ready access token is: env:NAME, file:PATH or cmd:COMMAND; none: Google's own credentials."
    )
    suffix: str | None = option(None, help="The tuned model's name, which the job's own characters follow.")
    learning_rate_multiplier: float | None = option(
        None, help="Times the service's own learning rate, for Gemini.", low=0.0
    )
    last_checkpoint_only: bool | None = option(None, help="Keep the last checkpoint alone; none: as the service does.")
    base_url: str | None = option(None, help="The service's address; none: the region's.")
    storage_url: str = option("https://storage.googleapis.com", help="Cloud Storage's address.")

    def __attrs_post_init__(self) -> None:
        if self.access_token is not None:
            check_reference(self.access_token, "Vertex.access_token")
        if self.suffix is not None and not 1 <= len(self.suffix) <= SUFFIX:
            problem = f"a suffix has 1 to {SUFFIX} characters"
            raise LuthierError("recipe-out-of-range", problem, where="Vertex.suffix", found=self.suffix)
        if self.gcs_folder is not None and not FOLDER.fullmatch(self.gcs_folder):
            problem = "it is an address such as gs://BUCKET/luthier"
            raise LuthierError("recipe-out-of-range", problem, where="Vertex.gcs_folder", found=self.gcs_folder)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="vertex",
            summary="Tuning jobs at Vertex AI: SFT and preference tuning of Gemini, SFT of open models with weights.",
            options=Vertex,
            build="luthier_vertex.service:VertexService",
        )
    ]
