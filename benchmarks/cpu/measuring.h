// What the programs of this folder share: the clock, quantiles, JSON files, and errors told in a line.
#pragma once

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace adpdm::benchmarks {

// Of this thread: what else the machine does hardly counts.
inline double thread_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

inline double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

template <typename Call>
double seconds_per_call(const Call& call, int calls) {
  call();  // caches were another contestant's
  const double begin = thread_seconds();
  for (int i = 0; i < calls; ++i) call();
  return (thread_seconds() - begin) / calls;
}

// How often a call has to be repeated to last so long.
template <typename Call>
int calls_lasting(double seconds, const Call& call) {
  return std::max(1, static_cast<int>(seconds / seconds_per_call(call, 2)));
}

// The processor's name; empty where the system does not tell it.
inline std::string processor_name() {
  std::ifstream lines("/proc/cpuinfo");
  for (std::string line; std::getline(lines, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "";
}

// None of the texts has a character that JSON would have to escape.
inline std::string quoted(const std::string& text) { return "\"" + text + "\""; }

// Objects as rows of a file like those of benchmarks/results_file.py.
inline std::string json(const std::string& settings, const std::vector<std::string>& rows) {
  std::string text =
      "{\n \"machine\": {\"cpu\": " + quoted(processor_name()) + "},\n \"settings\": {" + settings;
  text += "},\n \"rows\": [";
  const char* separator = "\n";
  for (const std::string& row : rows) {
    text += separator;
    text += "  {" + row + "}";
    separator = ",\n";
  }
  return text + "\n ]\n}\n";
}

// All at once or not at all: a reader never sees half a file.
inline void write(const std::filesystem::path& path, const std::string& text) {
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  const std::filesystem::path temporary = path.string() + ".tmp";
  std::ofstream file(temporary);
  file << text;
  file.close();
  if (!file) throw std::runtime_error("could not write " + temporary.string());
  std::filesystem::rename(temporary, path);
}

// FILE of the only arguments that are taken, --json FILE; empty without arguments.
inline std::string json_file(const std::vector<std::string>& arguments) {
  if (arguments.size() == 2 && arguments[0] == "--json") return arguments[1];
  if (!arguments.empty()) {
    throw std::runtime_error("wanted no arguments or --json FILE, got '" + arguments[0] + "'");
  }
  return "";
}

// The exit code of a program whose errors are told in a line.
inline int run_program(const char* name, int argc, char** argv, int (*run)(const std::vector<std::string>&)) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace adpdm::benchmarks
