"""Exports the machine's certificate authorities as a Java trust store: python scripts/trust_store.py OUT.

A packaged Java brings its own list of authorities; behind a company's proxy the machine's list, which pip and uv use,
is the right one. Writes nothing if the machine has no such list.
"""

import os
import sys
from pathlib import Path

from pyspark.java_gateway import launch_gateway

BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")  # Debian, Red Hat


def main(out: str) -> None:
    bundle = next((b for b in (os.environ.get("SSL_CERT_FILE", ""), *BUNDLES) if Path(b).is_file()), None)
    if bundle is None:
        return
    java = launch_gateway().jvm.java
    store = java.security.KeyStore.getInstance("PKCS12")
    store.load(None, None)
    authorities = java.security.cert.CertificateFactory.getInstance("X.509")
    for number, authority in enumerate(authorities.generateCertificates(java.io.FileInputStream(bundle))):
        store.setCertificateEntry(str(number), authority)
    # Py4J turns a Java string into a Python one, so the password's char[] comes from a buffer.
    store.store(java.io.FileOutputStream(out), java.nio.CharBuffer.allocate(8).put("changeit").array())


if __name__ == "__main__":
    main(sys.argv[1])
