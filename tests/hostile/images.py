"""The table of named hostile images: every CVE class of disk images that applies to us, as files that are tried for ever."""

from __future__ import annotations

from tests.hostile import path_images, probe_images, vhd_images, vhdx_images, vmdk_images
from tests.hostile.case import Hostile

IMAGES: dict[str, Hostile] = {
    **path_images.IMAGES,
    **probe_images.IMAGES,
    **vhd_images.IMAGES,
    **vhdx_images.IMAGES,
    **vmdk_images.IMAGES,
}
