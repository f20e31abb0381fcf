# dsv3_room(NAME SOURCES … ROOMS … LIBS … [TENSORS]): one static library per room of src/, named dsv3_NAME.
# ROOMS are the rooms it may include (tools/check_layers.py holds the #include lines to the same table).
# TENSORS: the room's sources see LibTorch and share the small precompiled header.
function(dsv3_room name)
  cmake_parse_arguments(ARG "TENSORS" "" "SOURCES;ROOMS;LIBS" ${ARGN})
  add_library(dsv3_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(dsv3_${name} PUBLIC dsv3_flags ${ARG_LIBS})
  foreach(room IN LISTS ARG_ROOMS)
    target_link_libraries(dsv3_${name} PUBLIC dsv3_${room})
  endforeach()
  if(ARG_TENSORS)
    dsv3_use_tensors(dsv3_${name})
  endif()
endfunction()

# Gives a target LibTorch's headers, libraries and the shared precompiled header.
function(dsv3_use_tensors target)
  target_link_libraries(${target} PUBLIC LibTorch::LibTorch)
  if(DSV3_PCH)
    target_precompile_headers(${target} REUSE_FROM dsv3_pch)
  endif()
endfunction()

# dsv3_test(NAME SOURCES … ROOMS … LABELS … [TENSORS]): one GoogleTest binary per room, each case a CTest test.
function(dsv3_test name)
  cmake_parse_arguments(ARG "TENSORS" "" "SOURCES;ROOMS;LABELS;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE dsv3_flags GTest::gtest GTest::gtest_main ${ARG_LIBS})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  foreach(room IN LISTS ARG_ROOMS)
    target_link_libraries(${name} PRIVATE dsv3_${room})
  endforeach()
  if(ARG_TENSORS)
    dsv3_use_tensors(${name})
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  # One process for the whole binary: starting LibTorch once per case would cost more than the cases.
  add_test(NAME ${name} COMMAND ${name} --gtest_brief=1)
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}")
endfunction()
