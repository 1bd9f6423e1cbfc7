#!/bin/bash
# SQLite: a journal and a write-ahead log, processes that write at once, one that is killed in the middle.
set -eu
cd /tmp
sqlite3 --version
for mode in delete wal; do
    db=$mode.db
    sqlite3 $db "pragma journal_mode=$mode; create table numbers(process, n, square);" >/dev/null
    for process in 1 2 3 4; do
        for n in $(seq 10); do
            echo "insert into numbers values ($process, $n, $n * $n);"
        done | sqlite3 -cmd '.timeout 60000' $db &
    done
    wait
    [ "$(sqlite3 $db 'select count(*), sum(square) from numbers')" = '40|1540' ]

    # Killed while a transaction is open: nothing of it is left.
    sqlite3 $db "begin; insert into numbers select 5, 1, 1 from numbers a, numbers b, numbers c limit 50000;" \
        ".shell touch inside; exec sleep 1000" &
    writer=$!
    until [ -e inside ]; do sleep 0.1; done
    rm inside
    kill -9 $writer
    wait $writer || true
    [ "$(sqlite3 $db 'select count(*) from numbers')" = 40 ]

    sqlite3 $db "with recursive c(n) as (select 1 union all select n + 1 from c where n < 50000)
        insert into numbers select 6, n, n * n from c; create index by_square on numbers(square);"
    [ "$(sqlite3 $db 'select n from numbers where square = 1522756')" = 1234 ]
    [ "$(sqlite3 $db 'pragma integrity_check')" = ok ]
    sqlite3 $db 'delete from numbers where n > 10; vacuum;'
    [ "$(sqlite3 $db 'pragma integrity_check; select count(*) from numbers')" = "$(printf 'ok\n50')" ]
done
echo "sqlite: all well"
