#!/bin/sh
# runtime.sh TREE: let TREE/bin/python3 run on hosts that have no Python and another C library.
#
# Container runtimes start the CNI plugin on the host. What the tree needs of this image (the dynamic loader,
# the C library, what extension modules link to) is copied into it, and the interpreter told to look there.
# TREE is at its final path, and patchelf is installed.
set -eu

tree=$1
libraries=$tree/lib/bundled
python=$(readlink -f "$tree/bin/python3")
loader=$(patchelf --print-interpreter "$python")

mkdir -p "$libraries"
find "$tree" -type f \( -path "$python" -o -name '*.so' -o -name '*.so.*' \) ! -path "$libraries/*" -print |
while read -r object; do
    # What is no ELF file of this machine has nothing to say.
    ldd "$object" 2>/dev/null | awk '$2 == "=>" && $3 ~ "^/" { print $3 }'
done |
sort -u |
while read -r library; do
    case $library in
    "$tree"/*) ;;
    *) cp -L "$library" "$libraries/" ;;
    esac
done
cp -L "$loader" "$libraries/"

# An RPATH, not a RUNPATH: it holds for the libraries that modules load as well, unless one has a path of
# its own, as some builds of Python give to each of theirs.
patchelf --set-interpreter "$libraries/$(basename "$loader")" "$python"
for object in "$python" "$tree"/lib/lib*.so* "$tree"/lib/python3*/lib-dynload/*.so; do
    if [ -f "$object" ]; then
        patchelf --force-rpath --set-rpath "$tree/lib:$libraries" "$object"
    fi
done
