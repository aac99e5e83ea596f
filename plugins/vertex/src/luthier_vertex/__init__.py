"""The provider `vertex`: tuning jobs at Google's Vertex AI. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = 117  # characters: a display name has 128, of which 11 name the job
FOLDER = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](?:/[^/\s?#*\[\]]+)*/?")


@attrs.frozen(kw_only=True)
class Vertex:
    project: str | None = option(None, help="The project; none: GOOGLE_CLOUD_PROJECT.")
    location: str | None = option(None, help="The region, such as us-central1; none: GOOGLE_CLOUD_LOCATION.")
    gcs_folder: str | None = option(
        None, help="The Cloud Storage folder for rows and results, such as gs://BUCKET/luthier."
    )
    access_token: str | None = option(
        None, help="Where an access token is: env:NAME, file:PATH or cmd:COMMAND; none: Google's default credentials."
    )
    suffix: str | None = option(
        None, help="The beginning of the tuned model's name; characters of the job's id follow it."
    )
    learning_rate_multiplier: float | None = option(
        None, help="Factor of the service's own learning rate, for Gemini.", low=0.0
    )
    last_checkpoint_only: bool | None = option(None, help="Keep only the last checkpoint; none: the service decides.")
    base_url: str | None = option(None, help="The service's address; none: the region's.")
    storage_url: str = option("https://storage.googleapis.com", help="Cloud Storage's address.")

    def __attrs_post_init__(self) -> None:
        if self.access_token is not None:
            check_reference(self.access_token, "Vertex.access_token")
        if self.suffix is not None and not 1 <= len(self.suffix) <= SUFFIX:
            problem = f"a suffix must have 1 to {SUFFIX} characters"
            raise LuthierError("recipe-out-of-range", problem, where="Vertex.suffix", found=self.suffix)
        if self.gcs_folder is not None and not FOLDER.fullmatch(self.gcs_folder):
            problem = "it must be an address such as gs://BUCKET/luthier"
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
