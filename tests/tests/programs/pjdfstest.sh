# shellcheck shell=sh
# In /volume: all of pjdfstest. Only tests that need device nodes, which cannot be made there, may fail.
/tests/bin/pjdfstest -c /tests.d/pjdfstest.toml -p /volume >/tmp/log 2>&1
grep '^Summary:' /tmp/log
failed=$(grep 'FAILED$' /tmp/log | grep -vE '::(char|block) +FAILED$')
if [ -n "$failed" ]; then
    grep -A 3 'FAILED$' /tmp/log
    echo "pjdfstest: failed, and not for want of device nodes: $failed"
    exit 1
fi
passed=$(sed -n 's/^Summary:.* \([0-9]*\) passed.*/\1/p' /tmp/log)
if [ "${passed:-0}" -lt 290 ]; then
    tail -n 20 /tmp/log
    echo "pjdfstest: only ${passed:-0} passed"
    exit 1
fi
