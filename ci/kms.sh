# Real key servers for the boot tests and the campaigns: PyKMIP's and OpenBao, as ci/servers installs them, and our broker with
# a TPM by swtpm. Source it after ci/boot.sh; what is started ends with the script.
# shellcheck shell=bash

KMS=$WORK/kms
CERTIFICATES=$WORK/certificates
declare -A KMS_PROCESS=() # of each server that runs, by name
SWTPM=                    # the TPM's

make_certificates() {
    mkdir -p "$CERTIFICATES"
    python3 "$REPO/tests/providers/certificates.py" "$CERTIFICATES"
}

# free_port: one that nobody listens on, below those that the kernel gives out. The tests in Rust use those from 20000 on.
free_port() {
    python3 - $((RANDOM % 2000)) <<'END_OF_PYTHON'
import socket, sys

for n in range(2000):
    port = 18000 + (int(sys.argv[1]) + n) % 2000
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        continue
    print(port)
    break
END_OF_PYTHON
}

# start_pykmip NAME PORT: a server on $KMS/kmip.database, which all of them share.
start_pykmip() {
    local name=$1 port=$2
    # It has processes of its own, which end with its group.
    TMPDIR=$KMS setsid "$BUILD/servers/bin/python" "$REPO/tests/providers/kmip_server.py" "$KMS/$name" "$KMS/kmip.database" \
        "$CERTIFICATES/server" 127.0.0.1 "$port" >"$KMS/$name.out" 2>&1 &
    KMS_PROCESS[$name]=$!
    wait_until 60 listens "$port" || die "PyKMIP does not start: $(tail -n 5 "$KMS/$name.out")"
}

# start_openbao PORT PORT: for hosts, and for its like; unsealed, with what docs/providers.md tells an operator to set up, and the host's AppRole in
# $KMS/role-id and $KMS/secret-id. What it stores outlives it.
start_openbao() {
    local port=$1 cluster=$2 first=
    [ -d "$KMS/bao" ] || first=yes
    mkdir -p "$KMS/bao"
    echo "$port" >"$KMS/bao.port"
    cat >"$KMS/bao.hcl" <<END_OF_CONFIGURATION
storage "raft" {
  path = "$KMS/bao"
  node_id = "one"
  performance_multiplier = 1
}
cluster_addr = "https://127.0.0.1:$cluster"
listener "tcp" {
  address = "127.0.0.1:$port"
  cluster_address = "127.0.0.1:$cluster"
  tls_cert_file = "$CERTIFICATES/server.pem"
  tls_key_file = "$CERTIFICATES/server.key"
}
api_addr = "https://127.0.0.1:$port"
END_OF_CONFIGURATION
    HOME=$KMS setsid "$BUILD/servers/bin/bao" server -config="$KMS/bao.hcl" >>"$KMS/bao.out" 2>&1 &
    KMS_PROCESS[openbao]=$!
    wait_until 60 listens "$port" || die "OpenBao does not start: $(tail -n 5 "$KMS/bao.out")"
    [ -z "$first" ] || bao operator init -key-shares=1 -key-threshold=1 -format=json >"$KMS/bao.init"
    bao operator unseal "$(field "$KMS/bao.init" '["unseal_keys_b64"][0]')" >/dev/null
    wait_until 60 bao token lookup >/dev/null 2>&1 || die "OpenBao does not unseal"
    [ -z "$first" ] || set_up_openbao
}

set_up_openbao() {
    {
        bao secrets enable transit
        bao write -f transit/keys/sealblk
        bao policy write sealblk - <<'END_OF_POLICY'
path "transit/datakey/wrapped/sealblk" { capabilities = ["update"] }
path "transit/decrypt/sealblk"         { capabilities = ["update"] }
path "transit/keys/sealblk"            { capabilities = ["read"] }
END_OF_POLICY
        bao auth enable approle
        bao write auth/approle/role/host token_policies=sealblk
    } >"$KMS/bao.set-up"
    bao read -field=role_id auth/approle/role/host/role-id >"$KMS/role-id"
    (umask 077 && bao write -f -field=secret_id auth/approle/role/host/secret-id >"$KMS/secret-id")
}

# bao ARGUMENT...: what its operator does.
bao() {
    local token=
    [ ! -s "$KMS/bao.init" ] || token=$(field "$KMS/bao.init" '["root_token"]')
    env HOME="$KMS" BAO_ADDR="https://127.0.0.1:$(cat "$KMS/bao.port")" BAO_CACERT="$CERTIFICATES/ca.pem" BAO_TOKEN="$token" \
        "$BUILD/servers/bin/bao" "$@"
}

# start_swtpm: a TPM with an endorsement key that is certified by $KMS/tpm/ca/cert.pem; sealblk and tpm2-tools call it $TPM.
start_swtpm() {
    local dir=$KMS/tpm
    mkdir -p "$dir/state" "$dir/ca"
    cat >"$dir/ca.conf" <<END_OF_CONFIGURATION
statedir = $dir/ca
signingkey = $dir/ca/key.pem
issuercert = $dir/ca/cert.pem
certserial = $dir/ca/serial
END_OF_CONFIGURATION
    echo "--platform-manufacturer test" >"$dir/ca.options"
    cat >"$dir/setup.conf" <<END_OF_CONFIGURATION
create_certs_tool = swtpm_localca
create_certs_tool_config = $dir/ca.conf
create_certs_tool_options = $dir/ca.options
active_pcr_banks = sha256
END_OF_CONFIGURATION
    swtpm_setup --tpm2 --create-ek-cert --lock-nvram --config "$dir/setup.conf" --tpmstate "$dir/state" >"$dir/setup.log" 2>&1 ||
        die "the TPM cannot be made: $(tail -n 5 "$dir/setup.log")"
    swtpm socket --tpm2 --flags not-need-init,startup-clear --tpmstate "dir=$dir/state" \
        --server "type=unixio,path=$dir/socket" --ctrl "type=unixio,path=$dir/socket.ctrl" 2>>"$dir/log" &
    SWTPM=$!
    TPM=swtpm:path=$dir/socket
    wait_until 30 test -S "$dir/socket" || die "swtpm does not start: $(tail -n 5 "$dir/log")"
}

# set_up_broker PORT: as docs/broker.md tells an operator to. It expects the host to be as it is now; the token that enrols
# the host is in $KMS/node1.token.
set_up_broker() {
    local register value pcrs=()
    cat >"$KMS/broker.toml" <<END_OF_CONFIGURATION
listen = "127.0.0.1:$1"
certificate = "$CERTIFICATES/server.pem"
key = "$CERTIFICATES/server.key"
state-dir = "$KMS/broker"
endorsement-authorities = "$KMS/tpm/ca/cert.pem"
END_OF_CONFIGURATION
    for register in 0 7 11; do
        TPM2TOOLS_TCTI=$TPM tpm2_pcrread "sha256:$register" --output "$KMS/register" >/dev/null
        value=$(od -A n -t x1 -v "$KMS/register" | tr -d ' \n')
        pcrs+=(--pcr "$register=$value")
    done
    broker resource add sealblk/kek/1
    broker reference set node "${pcrs[@]}"
    broker host enrol node1 --reference node --resource sealblk/kek/1 --token-file "$KMS/node1.token"
}

# start_broker PORT
start_broker() {
    setsid "$SEALBLK" --config "$KMS/broker.toml" broker serve >>"$KMS/broker.out" 2>&1 &
    KMS_PROCESS[broker]=$!
    wait_until 30 listens "$1" || die "the broker does not start: $(tail -n 5 "$KMS/broker.out")"
}

# broker ARGUMENT...: what its operator does.
broker() { "$SEALBLK" --config "$KMS/broker.toml" broker "$@" >>"$KMS/broker.set-up"; }

# kill_kms NAME: ends a server as a crash would.
kill_kms() {
    local process=${KMS_PROCESS[$1]}
    unset "KMS_PROCESS[$1]"
    kill -KILL -- "-$process"
    wait "$process" 2>/dev/null || true
}

kill_all_kms() {
    local name
    for name in "${!KMS_PROCESS[@]}"; do kill_kms "$name"; done
}

end_kms() {
    kill_all_kms
    [ -z "$SWTPM" ] || kill "$SWTPM" 2>/dev/null || true
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# field FILE PATH: of a JSON file, by a path as Python writes it.
field() { python3 -c "import json, sys; print(json.load(open(sys.argv[1]))$2)" "$1"; }
