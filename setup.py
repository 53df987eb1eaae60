"""One table of extensions. A failed compile fails the build: there is no pure-Python fallback.

PODLOOM_DEBUG=1 builds with bounds-checked asserts and no optimisation; benchmarks refuse such a build.
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("PODLOOM_DEBUG") == "1"

EXTENSIONS = [
    "fastpath.drops",
    "fastpath.wire.checksum",
    "fastpath.wire.geneve",
    "fastpath.wire.vxlan",
    "fastpath.wire.classify",
    "fastpath.offload.virtio",
    "fastpath.offload.plan",
    "fastpath.offload.segment",
    "fastpath.offload.coalesce",
    "fastpath.offload.tunnel",
    "fastpath.table",
    "fastpath.spin",
    "fastpath.kernel.tap",
    "fastpath.kernel.udp",
    "fastpath.probes",
    "fastpath.sender",
    "fastpath.writer",
    "fastpath.pump",
]

CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
# What Cython's own generated code trips over; ours is clean without them.
CFLAGS += ["-Wno-unused-parameter", "-Wno-unused-function"]
CFLAGS += ["-Wno-missing-field-initializers", "-Wno-cast-function-type"]
CFLAGS += ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-DNDEBUG"]

setup(
    ext_modules=cythonize(
        [
            Extension(name, [name.replace(".", "/") + ".pyx"], extra_compile_args=CFLAGS)
            for name in EXTENSIONS
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": False,
        },
        show_all_warnings=False,
        nthreads=2,
    ),
)
