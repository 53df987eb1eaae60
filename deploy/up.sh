#!/bin/sh
# Run the daemon on a configuration that is the same for all nodes, but for the node's own addresses:
# @HOST_IPS@ in it stands for them. HOST_IPS has them with commas between, as the downward API gives them.
set -eu

template=${TEMPLATE:-/config/podloom.toml}
config=${CONFIG:-/etc/podloom/podloom.toml}
: "${HOST_IPS:?must be the addresses of the node, as status.hostIPs has them}"

endpoints=$(printf '%s' "$HOST_IPS" | sed 's/[^,]*/"&"/g; s/,/, /g')
mkdir -p "$(dirname "$config")"
sed "s|@HOST_IPS@|$endpoints|" "$template" > "$config"
exec podloom up -c "$config"
