// Counts in a pair of words behind two marks, while goroutines check tables that they keep replacing.
// usage: busy MARK MARK. It prints "at N" now and then, or once "FAIL ...".
package main

import (
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
)

var words [512]uint64

func entry(key, turn int) []int {
	made := make([]int, 64)
	for i := range made {
		made[i] = key*31 + turn*7 + i
	}
	made[0] = turn
	return made
}

func replaceEntries(turn int) {
	table := map[int][]int{}
	for ; ; turn++ {
		key := turn * 40503 % 503
		if found, ok := table[key]; ok {
			for i, value := range entry(key, found[0]) {
				if found[i] != value {
					fmt.Println("FAIL entry", key, found)
					os.Exit(1)
				}
			}
		}
		table[key] = entry(key, turn)
	}
}

func main() {
	for i := 0; i < 2; i++ {
		mark, err := strconv.ParseUint(os.Args[1+i], 10, 64)
		if err != nil {
			panic(err)
		}
		atomic.StoreUint64(&words[i], mark)
	}
	for i := 0; i < 100; i++ {
		go replaceEntries(i)
	}
	for count := uint64(1); ; count++ {
		atomic.StoreUint64(&words[2], count)
		atomic.StoreUint64(&words[3], count)
		if count%1000000 == 0 {
			fmt.Println("at", count)
		}
	}
}
