#!/bin/sh
# A gate for a long-context checkpoint in CI: every check runs, a report is written, and the exit code is 1 where one
# failed. Checks: the files load in plain transformers, short texts did not suffer, passkey and needles are found at the
# new length, and LongBench where its data are at hand.
#
#   sh recipes/eval/ci.sh MODEL BASE TEXTS LENGTH [OUT]
#
# The bars are environment variables: TOLERANCE (share of perplexity that short texts may lose), PASSKEY and NEEDLE
# (shares of 0 to 1), LONGBENCH (a folder of its data) with ENGLISH (its English average, 0 to 100).
set -u
model=$1 base=$2 texts=$3 length=$4 out=${5:-results/ci}
status=0

check() {
    echo "== longext $*"
    longext "$@" || status=1
}

check verify "$model"
check eval short "$model" --against "$base" --data "$texts" --tolerance "${TOLERANCE:-0.05}" -o "$out/short" --force
check passkey "$model" --lengths "$length" --fail-under "${PASSKEY:-0.9}" -o "$out/passkey" --force
check eval needle "$model" --lengths "$length" --tasks single --scoring exact --fail-under "${NEEDLE:-0.5}" \
    -o "$out/needle" --force
if [ -n "${LONGBENCH:-}" ]; then
    check eval longbench "$model" --data "$LONGBENCH" --fail-under "english=${ENGLISH:-30}" -o "$out/longbench" --force
fi
longext report "$out" -o "$out/report" --force || status=1
exit $status
