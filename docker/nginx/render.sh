#!/bin/sh
# Writes nginx.conf and servers.conf from nginx.conf.template and the environment. With the argument "servers" it
# writes servers.conf alone, and ends with exit code 3 if that file does not change.
#
#   WEBHOOK_UPSTREAM  the replicas, NAME:PORT or ADDRESS:PORT, one or several       [webhook-api:3001]
#   LISTEN            port, or address:port                                         [3000]
#   TLS_LISTEN, TLS_CERTIFICATE, TLS_KEY   an additional TLS port, and its files    [none]
#   TRUSTED_NETWORKS  networks without a rate limit, or "none"                      [loopback and private ones]
#   REAL_IP_FROM      networks of load balancers whose X-Forwarded-For is trusted   [none]
#   API_UPSTREAM      the server for GET /api/...: [http[s]://]HOST[:PORT]          [none: 502]
#   WEBHOOK_MAX_BODY  bytes, as for the daemon                                      [16777216]
#   NGINX_RESOLVER    DNS servers                                                   [those of /etc/resolv.conf]
#   NGINX_CONF        directory to write to                                         [/tmp]
#   NGINX_RUN         directory for nginx.pid and temporary files                   [/tmp]
#   NGINX_ACCESS_LOG  file                                                          [/dev/stdout]
#   NGINX_PROGRAM     the nginx program                                             [nginx]
set -eu

WEBHOOK_UPSTREAM=${WEBHOOK_UPSTREAM:-webhook-api:3001}
LISTEN=${LISTEN:-3000}
TRUSTED_NETWORKS=${TRUSTED_NETWORKS:-127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7}
NGINX_CONF=${NGINX_CONF:-/tmp}
NGINX_RUN=${NGINX_RUN:-/tmp}
NGINX_ACCESS_LOG=${NGINX_ACCESS_LOG:-/dev/stdout}
WEBHOOK_MAX_BODY=${WEBHOOK_MAX_BODY:-16777216}
here=$(dirname "$0")

fail() {
    echo "$0: $*" >&2
    exit 1
}

# value NAME: print the value of that variable.
value() {
    eval "printf '%s\\n' \"\${$1:-}\""
}

# check NAME...: refuse values that could contain nginx directives.
check() {
    for name; do
        case $(value "$name") in
        *[!0-9A-Za-z.:/_\ ,\[\]-]*) fail "$name contains a character that is not allowed" ;;
        esac
    done
}

# words NAME: print the values in a variable, separated by blanks or commas, one per line.
words() {
    value "$1" | sed 's/[ ,][ ,]*/\n/g' | sed '/^$/d'
}

# Since 1.27.3, nginx looks up the names of an upstream again by itself.
nginx_resolves() {
    "${NGINX_PROGRAM:-nginx}" -v 2>&1 | sed 's|.*/||' |
        awk -F '[. ]' '{ exit !($1 * 1000000 + $2 * 1000 + $3 >= 1027003) }'
}

is_address() {
    case $1 in
    \[*) ;;
    *[!0-9.]*) return 1 ;;
    esac
}

# server ADDRESS [resolve]: nginx skips a replica for 2 s after it was unreachable or did not answer. If it skips all,
# it would refuse requests at once. So each replica is also a backup, which nginx always tries.
server() {
    echo "server $* max_fails=1 fail_timeout=2s;"
    echo "server $* max_fails=0 backup;"
}

# Older versions get the current addresses, with the name in a comment; start.sh looks them up again and again.
looked_up() {
    addresses=$(getent ahostsv4 "$1" | awk '$2 == "STREAM" { print $1 }' | sort -u)
    [ "$addresses" ] || return 1
    echo "# $1"
    for address in $addresses; do
        server "$address:$2"
    done
}

servers() {
    for upstream in $(words WEBHOOK_UPSTREAM); do
        name=${upstream%:*} port=${upstream##*:}
        if is_address "$name"; then
            server "$upstream"
        elif nginx_resolves; then
            server "$upstream" resolve
        else
            looked_up "$name" "$port" || return 1
        fi
    done
}

# New servers replace all old ones. If a name has no address, DNS is unavailable, and the old servers stay.
write_servers() {
    file=$NGINX_CONF/servers.conf
    if servers >"$file.new" && ! cmp -s "$file.new" "$file"; then
        mv "$file.new" "$file"
        return
    fi
    rm "$file.new"
    # nginx does not start without a server; this one is never used.
    [ -e "$file" ] || printf '# no address yet\nserver 127.0.0.1:1 down;\n' >"$file"
    return 3
}

nameservers() {
    if [ "${NGINX_RESOLVER:-}" ]; then
        words NGINX_RESOLVER
    elif [ -r /etc/resolv.conf ]; then
        awk '$1 == "nameserver" { print $2 ~ /:/ ? "[" $2 "]" : $2 }' /etc/resolv.conf
    fi
}

# each HEAD TAIL: put HEAD before and TAIL after each line of the input.
each() {
    sed "s|.*|$1&$2|"
}

write_configuration() {
    TRUSTED=
    [ "$TRUSTED_NETWORKS" = none ] || TRUSTED=$(words TRUSTED_NETWORKS | each "" " 1;")

    # X-Forwarded-For of a load balancer in front; entries of clients do not count.
    REAL_IP=
    if [ "${REAL_IP_FROM:-}" ]; then
        REAL_IP="$(words REAL_IP_FROM | each "set_real_ip_from " ";")
    real_ip_header X-Forwarded-For;
    real_ip_recursive on;"
    fi

    # Replicas listen on IPv4 by default.
    RESOLVER=$(nameservers | tr '\n' ' ')
    [ -z "$RESOLVER" ] || RESOLVER="resolver ${RESOLVER}valid=2s ipv6=off;
    resolver_timeout 1s;"

    case ${API_UPSTREAM:-} in
    "") API="return 502;" ;;
    http://*/* | https://*/*) fail "API_UPSTREAM: a host without a path, as in http://api:8080" ;;
    http://* | https://*) API="set \$api $API_UPSTREAM; proxy_pass \$api;" ;;
    */*) fail "API_UPSTREAM: a host without a path, as in http://api:8080" ;;
    *) API="set \$api http://$API_UPSTREAM; proxy_pass \$api;" ;;
    esac

    TLS=
    if [ "${TLS_CERTIFICATE:-}" ]; then
        TLS="listen ${TLS_LISTEN:-3443} ssl default_server backlog=4096;
        ssl_certificate $TLS_CERTIFICATE;
        ssl_certificate_key ${TLS_KEY:?is the file with the key of TLS_CERTIFICATE};
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:tls:1m;
        ssl_session_timeout 1h;"
    fi

    export LISTEN TLS TRUSTED REAL_IP RESOLVER API WEBHOOK_MAX_BODY NGINX_CONF NGINX_RUN NGINX_ACCESS_LOG
    # shellcheck disable=SC2016  # envsubst gets the names; nginx's own variables stay as they are
    envsubst '${LISTEN} ${TLS} ${TRUSTED} ${REAL_IP} ${RESOLVER} ${API} ${WEBHOOK_MAX_BODY}
        ${NGINX_CONF} ${NGINX_RUN} ${NGINX_ACCESS_LOG}' <"$here/nginx.conf.template" >"$NGINX_CONF/nginx.conf"
}

check WEBHOOK_UPSTREAM LISTEN TLS_LISTEN TLS_CERTIFICATE TLS_KEY TRUSTED_NETWORKS REAL_IP_FROM API_UPSTREAM \
    WEBHOOK_MAX_BODY NGINX_RESOLVER NGINX_CONF NGINX_RUN NGINX_ACCESS_LOG
for upstream in $(words WEBHOOK_UPSTREAM); do
    case ${upstream##*:} in "$upstream" | *[!0-9]*) fail "WEBHOOK_UPSTREAM: $upstream has no port" ;; esac
done
mkdir -p "$NGINX_CONF" "$NGINX_RUN"

case ${1:-all} in
servers) write_servers ;;
all)
    write_servers || [ $? = 3 ]
    write_configuration
    ;;
*) fail "unknown argument: $1" ;;
esac
