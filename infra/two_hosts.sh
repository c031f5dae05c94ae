#!/usr/bin/env bash
# Two "hosts" on one machine: network namespaces with addresses of their own, joined by a bridge in a third one. No name
# server is asked there: a question to one out of reach takes six seconds, and every connection asks. Nothing of it is
# seen from outside. UPVLA_HOSTS (default: upvla) is the prefix of their names.
#   infra/two_hosts.sh up                 hosts a (10.213.77.2) and b (10.213.77.3), each with an interface eth0
#   infra/two_hosts.sh run a COMMAND...   becomes COMMAND on host a
#   infra/two_hosts.sh cut b              pulls b's cable: what is on its way is lost, and no connection is told
#   infra/two_hosts.sh join b             puts it back
#   infra/two_hosts.sh down               ends what runs on the hosts and removes them
# Exits with 69 where a machine does not allow it: it takes root, iproute2, and a kernel with namespaces, veth and bridges.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
prefix="${UPVLA_HOSTS:-upvla}"
switch="$prefix-switch"

unavailable() {
  printf 'two_hosts: %s\n' "$*" >&2
  exit 69
}

up() {
  command -v ip >/dev/null || unavailable "there is no 'ip' here: install iproute2"
  local host number=2 said
  said="$(ip netns add "$switch" 2>&1)" || unavailable "no network namespace can be made here: $said"
  trap down ERR
  said="$(ip -n "$switch" link add bridge type bridge 2>&1)" || { down; unavailable "no bridge can be made here: $said"; }
  ip -n "$switch" link set bridge up
  for host in a b; do
    ip netns add "$prefix-$host"
    ip -n "$prefix-$host" link set lo up
    ip -n "$switch" link add "port-$host" type veth peer name eth0 netns "$prefix-$host"
    ip -n "$switch" link set "port-$host" master bridge up
    ip -n "$prefix-$host" address add "10.213.77.$number/24" dev eth0
    ip -n "$prefix-$host" link set eth0 up
    ip -n "$prefix-$host" route add default dev eth0 # how a program finds out which address is its own
    mkdir -p "/etc/netns/$prefix-$host"
    echo 'nameserver 127.0.0.1' >"/etc/netns/$prefix-$host/resolv.conf" # where nothing listens
    number=$((number + 1))
  done
}

down() {
  local name
  for name in "$prefix-a" "$prefix-b" "$switch"; do
    [ -e "/run/netns/$name" ] || continue
    ip netns pids "$name" | xargs -r kill -KILL || true
    ip netns delete "$name"
    rm -rf "/etc/netns/$name"
  done
}

case "${1:-}" in
  up) up ;;
  run) exec ip netns exec "$prefix-$2" "${@:3}" ;;
  cut) ip -n "$switch" link set "port-$2" down ;;
  join) ip -n "$switch" link set "port-$2" up ;;
  down) down ;;
  *)
    sed -n '2,10s/^# //p' "$0" >&2
    exit 2
    ;;
esac
