#!/bin/bash
# nginx with two workers: small files to many clients at once, large ones, ranges, IPv6, a new configuration while it serves.
set -eu
nginx -v 2>&1
root=/var/www/html
head -c 50000000 /dev/urandom >$root/large
for i in $(seq 100); do echo "file $i" >"$root/small-$i"; done
sed -i 's/^worker_processes .*/worker_processes 2;/' /etc/nginx/nginx.conf
nginx
[ "$(curl -sf http://localhost/small-7)" = 'file 7' ]
[ "$(curl -sf 'http://[::1]/small-8')" = 'file 8' ]
[ "$(curl -s -o /dev/null -w '%{http_code}' http://localhost/absent)" = 404 ]

# 8 clients, 100 files each, over one connection each.
for client in $(seq 8); do
    curl -sf "http://localhost/small-[1-100]" >/tmp/all-"$client" &
done
wait
for client in $(seq 8); do
    [ "$(sha256sum </tmp/all-"$client")" = "$(seq -f 'file %g' 100 | sha256sum)" ]
done
[ "$(grep -c 'small-' /var/log/nginx/access.log)" = 802 ]

# 4 clients, 50 MB each; one of them goes away in the middle.
for client in 1 2 3 4; do
    curl -sf http://localhost/large | sha256sum >/tmp/sum-$client &
done
curl -sf http://localhost/large | head -c 1000000 >/dev/null || true
wait
for client in 1 2 3 4; do
    [ "$(cat /tmp/sum-$client)" = "$(sha256sum <$root/large)" ]
done

# Ranges: in the middle, at the end, none.
range() { curl -s -r "$1" http://localhost/large | sha256sum; }
[ "$(range 1000000-1999999)" = "$(tail -c +1000001 $root/large | head -c 1000000 | sha256sum)" ]
[ "$(range -1000)" = "$(tail -c 1000 $root/large | sha256sum)" ]
[ "$(curl -s -o /dev/null -w '%{http_code}' -r 60000000- http://localhost/large)" = 416 ]

# A new configuration, read by new workers while the old ones end.
echo 'server { listen 8080; root /usr/share/doc; autoindex on; gzip on; gzip_types *; gzip_min_length 1; }' >/etc/nginx/conf.d/more.conf
nginx -s reload
until curl -sf http://localhost:8080/ >/tmp/index; do sleep 0.1; done
grep -q 'bash/' /tmp/index
curl -sf --compressed http://localhost:8080/bash/copyright | cmp - /usr/share/doc/bash/copyright
nginx -s quit
while [ -e /run/nginx.pid ]; do sleep 0.1; done
if grep -E '\[(warn|error|crit|alert|emerg)\]' /var/log/nginx/error.log | grep -v -E 'absent|Broken pipe|reset by peer'; then exit 1; fi
echo "nginx: all well"
