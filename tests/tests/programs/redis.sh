#!/bin/bash
# Redis under load: many connections and pipelines, then its three ways of keeping data, each read back by a new server.
set -eu
cd /tmp
start() {
    redis-server --daemonize yes --dir /tmp --unixsocket /tmp/redis.sock --logfile /tmp/redis.log --save '' "$@" >/dev/null
    until redis-cli ping >/dev/null 2>&1; do sleep 0.05; done
}
same() { [ "$2" = "$3" ] || { echo "$1: $2 and not $3"; tail /tmp/redis.log; exit 1; }; }

start
redis-cli info server | grep -E '^redis_version'
redis-benchmark -q --csv -n 5000 -c 50 -P 16 -t set,get,incr,lpush,rpop,sadd,hset,spop,zadd,lrange_100,mset
redis-benchmark -q --csv -n 1000 -c 20 -t ping,set,get
redis-benchmark -q --csv -n 1000 -c 20 -s /tmp/redis.sock -t set,get
redis-benchmark -q --csv -n 500 -c 5 -d 100000 -t set,get

# A script, a transaction, a message to who listens, a key that goes by itself.
same script "$(redis-cli eval 'local s = 0 for i = 1, 1000 do s = s + i end return s' 0)" 500500
same transaction "$(printf 'multi\nincr n\nincr n\nexec\n' | redis-cli | tail -n 1)" 2
redis-cli subscribe news >heard &
until [ "$(redis-cli pubsub numsub news | tail -n 1)" = 1 ]; do sleep 0.05; done
redis-cli publish news hello >/dev/null
until grep -q hello heard; do sleep 0.05; done
redis-cli set brief 1 px 50 >/dev/null
sleep 0.3
same expiry "$(redis-cli exists brief)" 0

# A snapshot by a child that shares the memory, and an append-only file that is written anew.
redis-cli debug populate 20000 >/dev/null
redis-cli bgsave >/dev/null
until redis-cli info persistence | grep -q 'rdb_bgsave_in_progress:0'; do sleep 0.1; done
redis-cli info persistence | grep -q 'rdb_last_bgsave_status:ok'
count=$(redis-cli dbsize)
redis-cli shutdown nosave
start
same snapshot "$(redis-cli dbsize)" "$count"
redis-cli config set appendonly yes >/dev/null
until redis-cli info persistence | grep -q 'aof_rewrite_in_progress:0'; do sleep 0.1; done
redis-cli set last word >/dev/null
kill -9 "$(redis-cli info server | sed -n 's/^process_id:\([0-9]*\).*/\1/p')"
while redis-cli ping >/dev/null 2>&1; do sleep 0.05; done
start --appendonly yes
same 'append-only file' "$(redis-cli get last) $(redis-cli dbsize)" "word $((count + 1))"
redis-cli shutdown nosave
echo "redis: all well"
