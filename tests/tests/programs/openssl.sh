#!/bin/bash
# OpenSSL: digests and ciphers that are checked, speed, an authority of one's own, TLS servers and clients, large files over TLS.
set -eu
openssl version
mkdir /tmp/tls && cd /tmp/tls
[ "$(printf abc | openssl dgst -sha256 -r | cut -d ' ' -f 1)" = ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad ]
[ "$(openssl rand -hex 16)" != "$(openssl rand -hex 16)" ]
head -c 5000000 /dev/urandom >data
for cipher in aes-256-cbc aes-128-ctr chacha20 camellia-256-cbc; do
    # shellcheck disable=SC2094 # no command writes to it
    openssl enc -$cipher -pbkdf2 -k secret <data | openssl enc -d -$cipher -pbkdf2 -k secret | cmp - data
done
openssl speed -seconds 1 -bytes 16384 -evp aes-256-gcm 2>/dev/null | tail -n 1
openssl speed -seconds 1 -bytes 16384 -evp sha256 2>/dev/null | tail -n 1
openssl speed -seconds 1 ecdsap256 2>/dev/null | tail -n 1

openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 30 -subj '/CN=own authority' 2>/dev/null
for kind in rsa ec; do
    case $kind in
    rsa) openssl genrsa -out $kind.key 2048 2>/dev/null ;;
    ec) openssl ecparam -name prime256v1 -genkey -noout -out $kind.key ;;
    esac
    openssl req -new -key $kind.key -subj /CN=localhost -out $kind.csr
    echo 'subjectAltName=DNS:localhost' >names
    openssl x509 -req -in $kind.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile names -out $kind.pem 2>/dev/null
    openssl verify -CAfile ca.pem $kind.pem >/dev/null
done

port=4430
for kind in rsa ec; do
    for version in tls1_2 tls1_3; do
        port=$((port + 1))
        openssl s_server -accept $port -cert $kind.pem -key $kind.key -$version -WWW -quiet >/dev/null 2>&1 &
        server=$!
        fetch() {
            printf 'GET /%s HTTP/1.0\r\n\r\n' "$1" |
                openssl s_client -connect localhost:$port -CAfile ca.pem -verify_return_error -verify_hostname localhost -quiet 2>/dev/null
        }
        until fetch names | grep -q DNS:localhost; do sleep 0.1; done
        for _ in 1 2 3 4 5; do fetch names | grep -q DNS:localhost; done
        fetch data | tail -c 5000000 | cmp - data
        # Who does not trust the authority does not connect.
        if openssl s_client -connect localhost:$port -verify_return_error </dev/null >/dev/null 2>&1; then exit 1; fi
        kill $server
        wait $server || true
    done
done
echo "openssl: all well"
