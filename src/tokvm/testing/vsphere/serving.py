"""The endpoint behind its HTTPS listeners: in this process, or in one of its own (python -m tokvm.testing.vsphere FOLDER HOST).

folder/  port        the API's      host-port   vCenter only: of the ESXi host itself, whom lease URLs name
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tokvm.testing.certificates import Authority
from tokvm.testing.persona.store import replace
from tokvm.testing.vsphere.endpoint import Endpoint
from tokvm.testing.vsphere.listener import Listener

API, HOST = "vsphere", "esxi"
PORT_FILES = {API: "port", HOST: "host-port"}


class Serving:
    def __init__(self, folder: Path, host: Path) -> None:
        """host: the folder of the played ESXi host. Listens at the ports it had before, if any."""
        self.folder = folder
        self.endpoint = Endpoint(folder, host)
        names = [API, HOST] if self.endpoint.options["vcenter"] else [API]
        self.listeners = {name: self._listen(name) for name in names}

    def _listen(self, name: str) -> Listener:
        port_file = self.folder / PORT_FILES[name]
        port = 0
        with contextlib.suppress(OSError, ValueError):
            port = int(port_file.read_text())
        listener = Listener(Authority(self.folder / "tls").server(name), self.endpoint.answer, port=port)
        replace(port_file, f"{listener.port}\n")
        return listener

    def renew_certificate(self, name: str = API) -> None:
        self.listeners[name].use_certificate(Authority(self.folder / "tls").server(name, anew=True))

    def close(self) -> None:
        self.endpoint.close()
        for listener in self.listeners.values():
            listener.close()
