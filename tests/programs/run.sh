#!/bin/sh
# SPDX-License-Identifier: MIT
# run.sh MODEL INFO GENERATE EVAL: runs the programs as a shell does, and compares status, output and messages. MODEL is
# the reference case `zamba`, of which a byte below 96 is a token.
set -u
model=$1 info=$2 generate=$3 eval=$4
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

# expect STATUS STREAM TEXT COMMAND...: STREAM, out or err, must hold TEXT.
expect() {
  wanted=$1 stream=$2 text=$3
  shift 3
  "$@" >"$folder/out" 2>"$folder/err" </dev/null
  status=$?
  if [ "$status" -ne "$wanted" ] || ! grep -qF -e "$text" "$folder/$stream"; then
    echo "$*: status $status, wanted $wanted and on std$stream: $text"
    cat "$folder/out" "$folder/err"
    failed=1
  fi
}

expect 0 out 'Examples:' "$info" --help
expect 0 out 'Examples:' "$generate" --help
expect 0 out 'Examples:' "$eval" --help
expect 0 out 'zamba-case, model_type zamba' "$info" "$model"
expect 2 err 'did you mean --lengths?' "$info" "$model" --length 5
expect 0 err 'tokens/s' "$generate" "$model" --prompt 'HELLO 1' -n 5
expect 2 err 'did you mean --temperature?' "$generate" "$model" --prompt 'HELLO' --temprature 1
expect 1 err 'outside the model'\''s vocabulary of 96' "$generate" "$model" --prompt hello
expect 1 err 'is not a folder' "$generate" "$folder/absent" --prompt HELLO
expect 2 err 'gpu not in {cpu,cuda}' "$generate" "$model" --prompt HELLO --device gpu
expect 1 err 'cuda' "$generate" "$model" --prompt HELLO --device cuda # no model of this type is compiled in for it
printf 'SOME TEXT OF CAPITALS' >"$folder/text"
expect 0 out 'perplexity' "$eval" "$model" --text "$folder/text"
expect 1 err 'No such file or directory' "$eval" "$model" --items "$folder/absent"
: >"$folder/items"
expect 1 err 'holds no items' "$eval" "$model" --items "$folder/items" --output "$folder/scores"

# A damaged checkpoint, and one whose file cannot be read.
cp "$model/config.json" "$folder/"
expect 1 err 'model.safetensors' "$generate" "$folder" --prompt HELLO
head -c 100000 "$model/model.safetensors" >"$folder/model.safetensors"
expect 1 err 'model.safetensors' "$generate" "$folder" --prompt HELLO

# Ctrl-C: the text ends where it is, and a file that is not complete is not written. Job control is off in scripts, so
# the program must be told again to listen to the signal; env does.
interrupt() {
  env --default-signal=INT "$@" >"$folder/out" 2>"$folder/err" </dev/null &
  sleep 2
  kill -INT $!
  wait $!
  status=$?
  [ "$status" -eq 130 ] && return
  echo "$*: status $status after Ctrl-C, wanted 130"
  cat "$folder/err"
  failed=1
}
interrupt "$generate" "$model" --prompt HELLO --ignore-end -n 100000000 --max-length 3000000
[ -s "$folder/out" ] || { echo 'the text before Ctrl-C is missing' && failed=1; }
echo '{"prompt": "HELLO"}' >"$folder/prompts"
interrupt "$generate" "$model" --batch "$folder/prompts" --ignore-end -n 3000000 --output "$folder/answers"
yes 'SOME TEXT OF CAPITALS' | head -c 40000000 >"$folder/text"
interrupt "$eval" "$model" --text "$folder/text" --length 64 --stride 1
for file in answers scores; do
  [ ! -e "$folder/$file" ] || { echo "$file was written" && failed=1; }
done
exit $failed
