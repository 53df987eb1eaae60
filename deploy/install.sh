#!/bin/sh
# Put the runtime, the CNI plugin and its configuration on the node, whose directories are mounted below
# HOST (/host). The plugin names /opt/podloom/runtime, which is where it is here and there.
set -eu

host=${HOST:-/host}
runtime=${RUNTIME:-/opt/podloom/runtime}

# A plugin may be running from the old tree: it is moved away whole, and the new one is whole when it comes.
old=$host$runtime.old
new=$host$runtime.new
rm -rf "$old" "$new"
mkdir -p "$(dirname "$new")"
cp -a "$runtime" "$new"
if [ -e "$host$runtime" ]; then
    mv "$host$runtime" "$old"
fi
mv "$new" "$host$runtime"
rm -rf "$old"

exec "$runtime/bin/python3" -m forwarder cni install \
    --bin-dir "$host/opt/cni/bin" --conf-dir "$host/etc/cni/net.d"
