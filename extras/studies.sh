#!/usr/bin/env bash
# Every table and figure of docs/: the command that makes it, on two cores. All but `probe` continue
# where they were stopped. `bash extras/studies.sh main habit` runs one part; `figures` draws the
# figures again; without arguments it runs all of the built-in task, a night. `controls` needs
# `pip install prodigyopt`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-assets/sweeps}
export TQDM_DISABLE=${TQDM_DISABLE:-1}

# What a search is made of, as values of a grid.
paper=method=effopd+lr=1e-4
triggers=method=effopd+lr=1e-4+score=batch_kl+candidates=doubling+num_candidates=8
by_line=method=effopd+score=batch_kl+candidates=line+num_candidates=14+scope=all
line=$by_line+search_every=1
finder=$by_line+move_lr=1
once=$finder+searches=1

settings() {  # of a gap: as many steps as a tuned OPD needs
    case $1 in
        slip) echo --gap slip --steps 16 --eval_every 1 ;;
        habit) echo --gap habit --steps 48 --eval_every 4 ;;
        skill) echo --gap skill --steps 64 --eval_every 4 ;;
    esac
}

best_rates() {  # of a gap, about, as `lr` finds them
    case $1 in
        skill) tuned=1e-3 muon=3e-3 ;;
        *) tuned=1.5e-3 muon=7e-3 ;;
    esac
}

sweep() { # GRID GAP NAME
    "$python" -m extras.sweep "$1" --out_dir "$out/$3" $(settings "$2")
}

main() {  # the main table of a gap
    best_rates "$1"
    rows=OPD_tuned+method=opd+lr=$tuned,OPD_Muon_tuned+method=opd+lr=$muon+optimizer=muon
    rows+=,OPD_1e-4+method=opd+lr=1e-4
    for dv in 50 1000; do
        rows+=",paper_>_$dv+$paper+accept=gt+dv_size=$dv,paper_>=_$dv+$paper+accept=ge+dv_size=$dv"
    done
    rows+=,batch_KL_at_triggers+$triggers
    rows+=,line+$line+lr=1e-4,line_Muon+$line+lr=1e-4+optimizer=muon
    rows+=,finder+$finder+lr=1e-5,finder_Muon+$finder+lr=1e-5+optimizer=muon
    rows+=,finder_once+$once+lr=1e-5,finder_once_Muon+$once+lr=1e-5+optimizer=muon
    sweep "label=$rows seed=0:5" "$1" "main-$1"
}

lr() {  # the learning rate
    case $1 in
        skill) adamw=1e-4,3e-4,5e-4,1e-3,1.5e-3,2e-3 muon=5e-4,1e-3,3e-3,5e-3,7e-3,1e-2 seeds=0:3 ;;
        *) adamw=1e-4,3e-4,1e-3,1.5e-3,2e-3,3e-3 muon=1e-3,3e-3,5e-3,7e-3,1e-2,2e-2 seeds=0:5 ;;
    esac
    sweep "lr=$adamw label=OPD+method=opd seed=$seeds" "$1" "lr-$1"
    sweep "lr=$muon label=OPD_Muon+method=opd+optimizer=muon seed=$seeds" "$1" "lr-$1"
    if [ "$1" = skill ]; then return; fi
    searches=finder_once+$once,finder_once_Muon+$once+optimizer=muon
    if [ "$1" = slip ]; then                                  # on habit `searches` makes these
        searches+=,finder+$finder,finder_Muon+$finder+optimizer=muon
        searches+=,line+$line,line_Muon+$line+optimizer=muon
    fi
    sweep "lr=1e-6,1e-5,1e-4,1e-3,1e-2 label=$searches seed=0:5" "$1" "lr-$1"
}

searches() {  # those that go on after the first, from every rate, beside a tuned OPD
    rows=OPD_2e-3+method=opd+lr=2e-3,OPD_Muon_7e-3+method=opd+lr=7e-3+optimizer=muon
    rows+=,OPD_Muon_1e-4+method=opd+lr=1e-4+optimizer=muon
    for rate in 1e-6 1e-5 1e-4 1e-3 1e-2; do
        rows+=,finder_$rate+$finder+lr=$rate,finder_Muon_$rate+$finder+lr=$rate+optimizer=muon
        rows+=,line_$rate+$line+lr=$rate,line_Muon_$rate+$line+lr=$rate+optimizer=muon
    done
    sweep "label=$rows seed=0:5" "$1" "searches-$1"
}

controls() {  # other directions, a range test without a jump, Prodigy, other judges
    for optimizer in adamw muon; do
        "$python" -m extras.controls --lr 1e-4 --optimizer $optimizer $(settings "$1") \
            --only update,random,top,tail --out_dir "$out/directions-$1-$optimizer"
    done
    "$python" -m extras.controls --lr 1e-5 --only range_test,prodigy $(settings "$1") \
        --out_dir "$out/controls-$1"
    "$python" -m extras.controls --lr 1e-5 $(settings "$1") --out_dir "$out/scores-$1" \
        --only batch_kl,heldout_kl,rollout_kl,accuracy_50,accuracy_200
}

foresight() {  # the questions of analyze.py, by gap and by learning rate
    best_rates "$1"
    rows=OPD_1e-4+method=opd+lr=1e-4,OPD_tuned+method=opd+lr=$tuned
    rows+=,OPD_Muon+method=opd+lr=$muon+optimizer=muon,RL+method=rl+lr=3e-4
    "$python" -m extras.sweep "label=$rows seed=0:5" --out_dir "runs/foresight-$1" \
        --keep_checkpoints $(settings "$1")
    "$python" analyze.py "runs/foresight-$1" --out_dir "assets/analysis/$1"
}

# SmolLM2-135M towards its own SFT: docs/real-models.md says where these models and files come from.
words="--teacher teacher --data problems.jsonl --system Solve. --max_new_tokens 40"
words+=" --batch_size 16 --micro_batch_size 0"
accuracy=method=effopd+score=accuracy+candidates=linear+num_candidates=5+searches=0
accuracy+=+scope=attention+mlp+move_lr=false
line_beside_opd=OPD_1e-4+method=opd+lr=1e-4,line_1e-6+method=effopd+searches=0+search_every=1
line_beside_opd+=+move_lr=false+lr=1e-6

real_sweep() { # GRID NAME SETTING ...
    "$python" -m extras.sweep "$1" --module extras.real --out_dir "$out/$2" --eval_size 100 "${@:3}"
}

real() {  # OPD and searches, 16 steps, in bfloat16
    rows=OPD_1e-4+method=opd+lr=1e-4,OPD_3e-4+method=opd+lr=3e-4
    rows+=,finder_once_1e-5+method=effopd+lr=1e-5,finder_once_1e-6+method=effopd+lr=1e-6
    rows+=",paper_>_1e-4+$accuracy+accept=gt+lr=1e-4"
    more=OPD_Muon_3e-4+method=opd+lr=3e-4+optimizer=muon,OPD_1e-5+method=opd+lr=1e-5
    more+=,finder_once_Muon_1e-5+method=effopd+lr=1e-5+optimizer=muon
    for grid in "label=$rows seed=0:1" "label=$more seed=0:1" "label=$rows seed=1:3"; do
        real_sweep "$grid" real --student smollm2 $words --steps 16 --eval_every 8 --dtype mixed
    done
}

real_line() {  # from the paper's rate; on a CPU in float32
    rows=$line_beside_opd,finder_1e-6+method=effopd+searches=0+lr=1e-6
    real_sweep "label=$rows seed=0:3" real-line --student smollm2 $words --steps 12 --eval_every 6
}

real_gsm() {  # GSM8K's format: problems and worked answers of GSM-Symbolic
    "$python" -m extras.sweep "label=$line_beside_opd seed=0:1" --module extras.real \
        --student smollm2 --teacher teacher --data gsm.jsonl --system Solve. --max_new_tokens 64 \
        --batch_size 8 --micro_batch_size 0 --steps 8 --eval_every 8 --eval_size 50 \
        --out_dir "$out/real-gsm"
}

probe() {  # four KLs along the first Δ of a small rate, and along four of a good one
    look="--searches 0 --move_lr false --dv_size 16 --eval_size 2"
    look+=" --candidates extras.real_study:probe --score extras.real_study:four_kls"
    "$python" -m extras.real --student smollm2 $words $look --steps 1 --lr 1e-6 --dtype mixed \
        --out_dir runs/probe-first
    "$python" -m extras.real --student smollm2 $words $look --steps 8 --lr 1e-4 \
        --out_dir runs/probe-path
    for part in first path; do
        mkdir -p "$out/real-probe-$part"
        cp runs/probe-$part/{kls,search}.jsonl "$out/real-probe-$part"
    done
}

figures() {  # with their titles and targets, from the committed JSON; a few seconds
    draw() { # NAME TARGET TITLE [OPTION ...]
        "$python" -m extras.sweep --redraw "$out/$1/sweep.json" --target "$2" --title "$3" "${@:4}"
    }
    draw main-habit .7 "habit: only a learning rate of the right size gets there"
    draw main-skill .7 "skill: Muon is worth more than any search along AdamW's direction"
    draw main-slip .9 "slip: a temperature does it, and so does nearly any search"
    for part in "habit .7" "slip .9"; do
        read -r gap target <<<"$part"
        draw "lr-$gap" "$target" "$gap, AdamW: one search sets the rate (mean, 95% interval)" \
            --rows OPD,finder_once
    done
    draw directions-habit-adamw .55 "habit: nearly all of the update is worth following"
    draw directions-habit-muon .55 "habit: a search works along Muon's update too"
    draw controls-habit .7 "habit, from 1e-5: the rate without the jump, and no rate at all"
    draw controls-slip .9 "slip, from 1e-5: the rate without the jump, and no rate at all"
    draw scores-habit .7 "habit, the finder: who judges"
    "$python" -m extras.foresight assets/analysis/{slip,habit,skill}
    "$python" -m extras.real_study "$out/real" \
        --rows "OPD_1e-5,OPD_1e-4,OPD_3e-4,OPD_Muon_3e-4,finder_once_1e-5,paper_>_1e-4" \
        --title "SmolLM2-135M towards its own SFT (OPD 1e-4: mean of three seeds; others: one)"
    "$python" -m extras.real_study "$out/real-line" \
        --title "From 1e-6 a search finds the rate at once (mean of three seeds; finder: one)"
    "$python" -m extras.real_study --along "$out/real-probe-first" \
        --title "bfloat16 hides a small step, and old answers promise too much"
    "$python" -m extras.real_study --along "$out/real-probe-path" \
        --title "OPD at 1e-4: only the first steps could have been longer"
}

if [ $# = 1 ]; then
    "$1"
elif [ $# = 2 ]; then
    "$1" "$2"
else
    for gap in habit slip skill; do
        for part in main lr controls foresight; do
            "$part" "$gap"
        done
    done
    searches habit
    figures
fi
