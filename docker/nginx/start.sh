#!/bin/sh
# Renders the configuration (render.sh lists its variables), then becomes nginx.
set -eu

here=$(dirname "$0")
export NGINX_PROGRAM="${NGINX_PROGRAM:-nginx}" NGINX_CONF="${NGINX_CONF:-/tmp}" NGINX_RUN="${NGINX_RUN:-/tmp}"

# Before 1.27.3, nginx looks up the names of its upstream only when it starts. So this loop looks them up, and
# reloads nginx when they change; a reload finishes the requests in progress.
follow() {
    while sleep 1 && kill -0 "$1" 2>/dev/null; do
        if "$here/render.sh" servers && "$NGINX_PROGRAM" -t -q -c "$NGINX_CONF/nginx.conf"; then
            kill -HUP "$1" || break
        fi
    done
}

"$here/render.sh"
if grep -q '^#' "$NGINX_CONF/servers.conf"; then
    follow $$ &
fi
exec "$NGINX_PROGRAM" -c "$NGINX_CONF/nginx.conf" -g "daemon off;"
